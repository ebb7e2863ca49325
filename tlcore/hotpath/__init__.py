"""What runs once a call or once a byte. Private; imports nothing of tlcore."""

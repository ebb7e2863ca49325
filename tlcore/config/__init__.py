"""What the user asked for, as one frozen object. Private; never imports torch."""

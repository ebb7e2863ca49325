"""Private: what is done once a call or once a byte, in C where the extension is there, else in Python."""

"""Whether every captured row of every layer is the right row of the right layer. Private."""

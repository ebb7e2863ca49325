"""Summary statistics of a tensor: of host memory, on a device, of a stored tensor. Private."""

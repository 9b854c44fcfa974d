"""What the scripts share; each file can be lifted out on its own."""

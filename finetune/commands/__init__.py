"""The commands, one short file each: what is typed, what it does. Everything heavy is imported inside them."""

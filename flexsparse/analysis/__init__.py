"""What the compiler knows of a pattern: bounds of expressions on tiles, and the class of every tile."""

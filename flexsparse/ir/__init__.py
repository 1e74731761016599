"""The intermediate representation: typed nodes, their text, the flattened program, its rules and its verifier."""

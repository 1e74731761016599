"""What ``flexsparse show`` draws: the data of each picture, and the files that it is written to.

``mask``, ``elements``, ``curves`` and ``lifetimes`` find out what is to be drawn; ``figure`` puts it together.
``svg``, ``png`` and ``page`` write a figure to a file; the terminal's own drawing is in ``flexsparse.cli.render``
and ``flexsparse.cli.draw``.
"""

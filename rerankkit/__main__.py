"""`python -m rerankkit` is `rerankkit`."""

from rerankkit.cli import main

main()

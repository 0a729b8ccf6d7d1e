import sys

from scripts.serving.cli import main

sys.exit(main(sys.argv[1:]))

"""python -m adala.data.convert KIND SOURCE SHARDS [--workers N] [--max-size 512] [--split train] ..."""

import sys

from adala.data.convert.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

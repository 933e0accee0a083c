"""python -m adala.export FOLDER --to onnx|torch|timm [--size 448 | --size H W] [--out PATH] [--batch N|dynamic]"""

import sys

from adala.failures import report_failure


def main(arguments: list[str]) -> int:
    """Exports a student; the exit status says whether it was done."""
    try:
        from adala.export.command import run_export

        run_export(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""python -m adala.memory --recipe dinov2_large --gpus 8 --gpu_gib 80 [--json] [--stage2.micro_batch_size 8 ...]"""

import sys

from adala.failures import report_failure


def main(arguments: list[str]) -> int:
    """Prints what fits; the exit status says whether something does for every stage.

    It joins no group of processes, as commands do that train: there is nothing to be done on several ranks.
    """
    try:
        from adala.memory.command import parse_memory_command
        from adala.memory.planner import plan_memory
        from adala.memory.text import print_reports, reports_as_json

        command = parse_memory_command(arguments)
        reports = plan_memory(command.recipe, command.gpus, command.gpu_gib)
        if command.as_json:
            print(reports_as_json(reports, command.gpu_gib))
        else:
            print_reports(reports, command.gpu_gib)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0 if all(report.best is not None for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line: `python -m bench COMMAND`, one module of this package for each command."""

import argparse
import sys

from . import kernels, run, train

# A command is a module with a docstring (its help), add_arguments(parser) and run(args) -> exit status.
COMMANDS = {"run": run, "train": train, "kernels": kernels}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure xent_ext beside PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())

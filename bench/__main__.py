"""The command line: `python -m bench COMMAND`, one module of this package for each command."""

import argparse
import importlib
import sys

# A command is a module with a docstring (its help), add_arguments(parser) and run(args) -> exit status. It is imported
# when it is called: some need packages that others do without.
COMMANDS = {
    "verify": "prove or disprove it on this machine: right, fast, well planned? All into one zip file to send",
    "run": "time the loss beside the other implementations that are found here",
    "memory": "measure the peak memory of each implementation",
    "traffic": "what each implementation must move and hold, by a model that is checked against what it allocates",
    "linear": "time the last linear layer with its loss, and measure its peak memory",
    "parallel": "time the loss of classes that several processes share, and what each holds and sends",
    "overhead": "what a call costs the CPU, whatever the size of the logits",
    "train": "train the same model with torch.nn.CrossEntropyLoss and with xent_ext.CrossEntropyLoss",
    "figures": "draw the pictures of the READMEs",
    "plot": "draw the plots of a folder's results again, and its page",
    "compare": "compare two results, with an exit status for what became slower",
    "tune": "search the launch numbers for a GPU; without one, print what the plan chooses",
    "cpu_sizes": "measure from how many logits on blocks beat PyTorch's own on a CPU",
    "compile": "what the first call pays for compiling the kernels, without a GPU",
    "model": "what a model says of the kernels on GPUs: the tables of bench/TUNING.md",
    "kernels": "compile every variant of the kernels, without a GPU",
}
# Without a command: what takes about two minutes.
SUMMARY = ["run", "--suite", "summary", "--seconds", "4"]
EXTRA = ("tqdm", "matplotlib", "numpy", "sklearn")  # what the extra `bench` installs


def main(argv=None) -> int:
    argv = (sys.argv[1:] if argv is None else argv) or SUMMARY
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure xent_ext beside PyTorch and others. Without a command: a summary of two minutes.",
        epilog="\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these; COMMAND --help says more:")
    name = parser.parse_args(argv[:1]).command
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f'python -m bench {name} needs {error.name}: pip install -e ".[bench]"', file=sys.stderr)
        return 1
    command = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    return module.run(command.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

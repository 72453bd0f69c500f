"""The command line: train | sample | evaluate | export | check."""

import argparse
import sys
from pathlib import Path


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="diffdistill")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    return _train(options)


def _train(options) -> int:
    from diffdistill import build, checkpoint
    from diffdistill.config import load

    config, recipe = load(options.config, options.overrides)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    trainer = build.trainer(config, recipe)
    folder = checkpoint.latest(Path(config.output))
    if folder:
        trainer.resume(folder)
    return trainer.run() or 0


if __name__ == "__main__":
    sys.exit(main())

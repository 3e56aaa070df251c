"""Draws a figure from saved runs.

python -m launch.experiments --list
python -m launch.experiments --name=curves --output=results/mine runs/a runs/b
python -m launch.experiments --name=panels --options=images=2 --output=out runs/a

Writes OUTPUT/<name>.png, OUTPUT/<name>.svg and the numbers as OUTPUT/<name>.csv.
"""

from launch import cli
from mpmc_jax.analysis import base, registry
from mpmc_jax.text import printable


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("experiments", __doc__)
    parser.add_argument("--list", action="store_true", help="list all figures")
    parser.add_argument("--name", default="", help="the figure, see --list")
    parser.add_argument("--output", default="", help="folder for the files")
    parser.add_argument("--checkpoint", default="", help="best, last or a step")
    parser.add_argument("--options", default="", help="KEY=VALUE,... of the figure")
    cli.add_data_dir(parser)
    parser.add_argument("runs", nargs="*", help="directories of runs")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(_describe(name) for name in registry.FIGURES))
        return
    cli.setup_runtime()
    with cli.user_errors():
        if not args.runs:
            raise ValueError("name the directory of at least one run")
        paths = registry.make(
            args.name,
            args.runs,
            args.output,
            checkpoint=args.checkpoint,
            data_dir=args.data_dir,
            options=_parse_options(args.options),
        )
        print(printable(f"written: {', '.join(map(str, paths))}"))


def _parse_options(text: str) -> dict[str, str]:
    """Parses KEY=VALUE,...; see `registry.build_figure` for what they may be.

    Raises:
      ValueError: a part without "=".
    """
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--options={text}: {part!r} is not KEY=VALUE")
        options[key] = value
    return options


def _describe(name: str) -> str:
    """Describes a figure in one line: its name, what it shows, its options."""
    figure = registry.FIGURES[name]
    options = ",".join(f"{k}={v}" for k, v in base.default_options(figure).items())
    what = (figure.__doc__ or "").splitlines()[0]
    return f"{name:16} {what}" + (f" Options: {options}" if options else "")


if __name__ == "__main__":
    main()

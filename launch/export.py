r"""Writes a trained run as a folder to deploy or to publish.

python -m launch.export --workdir=runs/voc --output=voc \
    [--formats=weights,stablehlo,onnx] [--size=any|512x1024,...] \
    [--push=OWNER/NAME [--public]]

weights     weights.safetensors, for mpmc_jax.load_run, and a model card, README.md
stablehlo   a program for jax.export on --platforms, and predict_stablehlo.py
onnx        a model for onnxruntime, and predict_onnx.py

config.json and classes.json are written beside them. Programs take images as they are
stored, any number of one size, and return the class of every pixel and the
probabilities of all classes, by the run's protocol. --size=any is possible where whole
images are predicted by a network that takes any size; other runs have a program for
each size. --push uploads the folder to the Hugging Face hub, where you are logged in;
a repository that it makes is private unless --public is given.
"""

from launch import cli
from mpmc_jax.experiments import exported, programs
from mpmc_jax.experiments import run as runs
from mpmc_jax.models.weights import hub
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable

FORMATS = ("weights", "stablehlo", "onnx")


def parse_sizes(text: str) -> list[programs.Size]:
    """Reads --size: "any", or sizes such as 512x1024 between commas.

    Raises:
      ValueError: anything else.
    """
    if text == "any":
        return [None]
    sizes = []
    for each in text.split(","):
        sides = each.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise ValueError(
                f"--size={text}: give any, or rows x columns as in 512x1024"
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes


def parse_names(flag: str, text: str, valid: tuple[str, ...]) -> list[str]:
    """Reads names between commas.

    Raises:
      ValueError: an unknown one.
    """
    names = list(dict.fromkeys(text.split(",")))
    if unknown := sorted({*names} - {*valid}):
        raise ValueError(f"{flag}={text}: {unknown[0]!r} is none of {', '.join(valid)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("export", __doc__)
    cli.add_run(parser)
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument("--formats", default="weights", help="between commas")
    parser.add_argument("--size", default="any", help="any, or as in 512x1024,321x500")
    parser.add_argument(
        "--platforms", default=",".join(programs.PLATFORMS), help="of StableHLO"
    )
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="on the hub")
    parser.add_argument(
        "--public", action="store_true", help="everybody may read what --push uploads"
    )
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        formats = parse_names("--formats", args.formats, FORMATS)
        platforms = parse_names("--platforms", args.platforms, programs.PLATFORMS)
        sizes = parse_sizes(args.size)
        if args.public and not args.push:
            raise ValueError("--public is for --push=OWNER/NAME; give both or neither")
        workdir = as_path("--workdir", args.workdir)
        output = as_path("--output", args.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output={output} is not empty; name a new folder")
        run = runs.load_run(workdir, args.checkpoint)
        forms = [form for form in formats if form != "weights"]
        for form in forms:
            for size in sizes:
                programs.check_size(run, size, onnx=form == "onnx")
            programs.check_installed(form)
        output.mkdir(parents=True, exist_ok=True)
        written = exported.write_description(run, output)
        if "weights" in formats:
            scores = exported.read_scores(workdir, run.step)
            written += exported.write_weights(
                run, output, workdir.resolve().name, args.checkpoint, scores
            )
        for form in forms:
            written += exported.write_programs(run, output, form, sizes, platforms)
        for path in written:
            print(printable(f"{path}: {path.stat().st_size / 1e3:,.0f} kB"))
        if args.push:
            address = hub.push(output, args.push, public=args.public)
            print(printable(f"uploaded to {address}"))


if __name__ == "__main__":
    main()

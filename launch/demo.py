"""Shows a local page that predicts the images that are dropped on it.

python -m launch.demo --workdir=runs/camvid [--checkpoint=best|last|STEP] [--port=7860]

The page shows the prediction over the image, the classes with their shares and
confidence, and with MPMC the classes in each patch and lambda_s; all results can be
downloaded. It is shown by gradio: `pip install '.[demo]'`. It listens on
127.0.0.1 alone, shares nothing, and sends no telemetry.
"""

import pathlib
import tempfile

from launch import cli
from mpmc_jax.data.lists import IMAGE_SUFFIXES
from mpmc_jax.experiments import demo, demo_page
from mpmc_jax.experiments.run import load_run
from mpmc_jax.paths import as_path


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("demo", __doc__)
    cli.add_run(parser)
    parser.add_argument(
        "--port", type=int, default=7860, help="0 for the first free one from 7860"
    )
    parser.add_argument("--max_mb", type=float, default=demo.MAX_BYTES / 1e6)
    parser.add_argument("--max_pixels", type=int, default=demo.MAX_PIXELS)
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors(), tempfile.TemporaryDirectory() as made:
        gradio = demo_page.load_gradio()
        folder, workdir = pathlib.Path(made), as_path("--workdir", args.workdir)
        run = load_run(workdir, args.checkpoint)
        max_bytes = int(args.max_mb * 1e6)
        answers = demo.Demo(
            run, folder / "results", max_bytes=max_bytes, max_pixels=args.max_pixels
        )
        title = f"{workdir.absolute().name}: {run.facts.dataset}"
        formats = ", ".join(ending.removeprefix(".") for ending in IMAGE_SUFFIXES)
        page = demo_page.make_page(gradio, answers, title, formats)
        demo_page.show(gradio, page, folder, port=args.port, max_bytes=max_bytes)


if __name__ == "__main__":
    main()

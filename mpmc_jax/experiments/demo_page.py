"""The demonstration page, shown by gradio (optional) to this machine alone."""

import importlib
import os
import pathlib
from typing import Any

from mpmc_jax import web_page
from mpmc_jax.experiments.demo import Answer, Demo

_HOST = "127.0.0.1"
_STYLE = """
.gradio-container { width: 100%; min-width: 0 !important;
  max-width: 62rem !important; margin: 0 auto; }
.stack { position: relative; }
.stack img { display: block; width: 100%; height: auto; }
.stack .colors { position: absolute; inset: 0; opacity: var(--shown, .5);
  image-rendering: pixelated; }
.wrong { border-left: .3rem solid #c0392b; padding-left: .6rem; font-weight: 600; }
.min_value, .max_value { color: inherit !important; }
.dark .download-link { color: #93c5fd !important; }
.wide { overflow-x: auto; font-size: .85rem; }
.legend table { width: 100%; border-collapse: collapse; }
.legend caption { caption-side: bottom; text-align: left; font-size: .8rem; }
.legend td, .legend th { text-align: right; padding: .2rem .3rem; }
.legend td:first-child, .legend th:first-child { text-align: left; }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
  border: 1px solid #888; }
.grid { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.grid figure { margin: 0; }
.grid img { width: 100%; height: auto; image-rendering: pixelated; }
.grid figcaption { font-size: .8rem; }
"""
_SET_OPACITY = (
    "(value) => { document.documentElement.style.setProperty('--shown', value / 100); }"
)


def load_gradio() -> Any:
    """Imports gradio without its telemetry.

    Raises:
      ValueError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError(
            f"the page is shown by gradio, which cannot be imported ({error}); "
            "`pip install '.[demo]'` installs it"
        ) from error


def make_page(gradio: Any, demo: Demo, title: str, formats: str) -> Any:
    """Builds the page: a file, and what its prediction looks like."""

    def predict(file: str | None) -> tuple[Any, ...]:
        answer: Answer = demo(file)
        return (
            answer.message,
            answer.picture,
            answer.legend,
            answer.maps,
            [str(path) for path in answer.files] or None,
        )

    # Results are removed from gradio's folder after an hour.
    with gradio.Blocks(
        title=title, analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gradio.HTML(f"<h1>{web_page.escape(title)}</h1>")
        file = gradio.File(label=f"Image ({formats})", elem_id="file", height=140)
        message = gradio.HTML(elem_id="message")
        opacity = gradio.Slider(
            0, 100, 50, step=1, label="Opacity of the classes, %", elem_id="opacity"
        )
        picture = gradio.HTML(elem_id="picture")
        legend = gradio.HTML(elem_id="legend", elem_classes="legend")
        maps = gradio.HTML(elem_id="maps")
        files = gradio.File(
            label="Download",
            elem_id="download",
            interactive=False,
            file_count="multiple",
        )
        file.change(
            predict,
            file,
            [message, picture, legend, maps, files],
            concurrency_limit=1,
            api_visibility="private",
        )
        opacity.change(None, opacity, None, js=_SET_OPACITY, api_visibility="private")
    return page


def show(
    gradio: Any,
    page: Any,
    folder: pathlib.Path,
    *,
    port: int,
    max_bytes: int,
    block: bool = True,
) -> Any:
    """Serves the page to this machine until it is interrupted.

    Args:
      gradio: the module.
      page: from `make_page`.
      folder: the folder of results, from which files are served.
      port: on which to listen; 0 for the first free one from 7860.
      max_bytes: largest file that is taken.
      block: whether to wait for an interrupt; else returns the server's address.

    Raises:
      OSError: the port is taken.
    """
    system = ["system-ui", "sans-serif"]
    _, url, _ = page.launch(
        server_name=_HOST,
        server_port=port or None,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=max_bytes,
        allowed_paths=[str(folder)],
        ssr_mode=False,
        footer_links=[],
        css=_STYLE,
        theme=gradio.themes.Base(font=system, font_mono=["monospace"]),
    )
    print(f"{url} shows the page; Ctrl+C ends it", flush=True)
    if block:
        page.block_thread()
    return url

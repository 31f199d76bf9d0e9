"""The demo's page, and its server."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vim.demo import image, series, speed, video
from vim.demo.files import MOST_BYTES
from vim.demo.models import Models
from vim.errors import UserError

HOST = "127.0.0.1"
FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the system's: none is fetched


def build(models: Models, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        folder: where samples are written.
    """
    with gr.Blocks(title="vim-zoo", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown("# vim-zoo\nVision Mamba models on this computer. Files stay here, and are deleted when it ends.")
        with gr.Tab("Image"):
            image.tab(models, folder)
        with gr.Tab("Video"):
            video.tab(models, folder)
        with gr.Tab("Series"):
            series.tab(models, folder)
        with gr.Tab("Speed"):
            speed.tab()
    return app


@contextmanager
def serving(models: Models, port: int) -> Iterator[str]:
    """Serve the page to this computer only, as long as this context lasts, and return its address.

    No share link, analytics or check for a newer version. Uploads and samples are deleted at the end.

    Raises:
        UserError: the port is in use.
    """
    _check_free(port)
    with TemporaryDirectory(prefix="vim_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio has no argument for it
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST]))  # it asks its own server
        app = build(models, Path(folder))
        _, address, _ = app.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            max_file_size=MOST_BYTES,
            theme=gr.themes.Default(font=FONT, font_mono=MONOSPACE),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            num_workers=0,
            # a page of another site, whose name is made to lead here, would ask by that name
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]},
        )
        try:
            yield address
        finally:
            app.close(verbose=False)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a demo that ended may have left it waiting
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be opened ({error.strerror}): name another by --port") from error

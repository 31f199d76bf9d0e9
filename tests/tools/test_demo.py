"""The demo: its functions and its page through the HTTP API, and in a real browser."""

import json
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models
from tests.tiny import make_series, told, write_lines, write_run, write_truncated, write_video
from vim.data import Digits, read_image
from vim.data.digits import CLASSES
from vim.data.series import Scaler
from vim.data.video import motion
from vim.engine.files import write_csv
from vim.errors import UserError
from vim.models import TSM2
from vim.options import SeriesData
from vim.tasks.classification.predict import Predictor
from vim.tasks.forecasting.build import Forecaster

pytest.importorskip("gradio", reason="Gradio is not installed")
pytest.importorskip("selenium", reason="Selenium is not installed")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import WebDriverException  # noqa: E402

from vim.demo import app, files  # noqa: E402
from vim.demo.image import answer  # noqa: E402
from vim.demo.models import Models, find, load  # noqa: E402
from vim.demo.published import tags  # noqa: E402

GREY = {"in_chans": 1, "img_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    forecaster = Forecaster(
        TSM2(num_variates=2, seq_len=32, horizon=8, patch_size=16, embed_dim=8, depth=1).eval(),
        "tsm2",
        SeriesData(dataset="csv", lookback=32, horizon=8, batch_size=8),
        ["a", "b"],
        Scaler(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])),
        None,
        3600.0,
    )
    clips = {**GREY, "num_frames": 4, "num_classes": 4}
    images = {
        "vim": Predictor(timm.create_model("test_vim", num_classes=10, **GREY), {}, CLASSES),
        "mambavision": Predictor(timm.create_model("test_mambavision", num_classes=3), {}, ["a", "b", "<b>c</b>"]),
    }
    videos = {
        "causal": Predictor(timm.create_model("test_videomamba", directions="none", **clips), {}, list(motion.CLASSES)),
        "both": Predictor(timm.create_model("test_videomamba", **clips), {}, list(motion.CLASSES)),
    }
    return Models(images, videos, {"tsm2": forecaster})


@pytest.fixture(scope="module")
def address(models):
    """Where the demo is served."""
    with socket.socket() as free:
        free.bind((app.HOST, 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setenv("NO_PROXY", "")
        patch.setattr(app, "MOST_BYTES", 2**20)
        with app.serving(models, port) as address:
            folder = Path(os.environ["GRADIO_TEMP_DIR"])
            yield address
            assert any(folder.rglob("*.png"))
        assert not folder.exists()


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture
def digit(tmp_path):
    Digits(train=False).images[0].save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def confidences(label):
    return {one["label"]: one["confidence"] for one in label["confidences"]}


def test_an_image(client, models, digit):
    seen, label, mapped = client.predict("vim", handle_file(digit), "lrp", api_name="/image")
    predictor = models.images["vim"]
    assert confidences(label) == pytest.approx(dict(predictor([read_image(digit, "L")], 5)), rel=1e-5)
    assert label["label"] == max(confidences(label), key=confidences(label).get)
    seen, mapped = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (seen, mapped))
    assert seen.shape == mapped.shape == (288, 288, 3)
    assert abs(seen - mapped).max() > 50 and seen.std() > 50
    layers = [client.predict("vim", handle_file(digit), i, "forward", api_name="/layer") for i in range(2)]
    assert Path(layers[0]).read_bytes() != Path(layers[1]).read_bytes()
    between = client.predict("vim", handle_file(digit), 0.8, "forward", api_name="/layer")  # typed beside the slider
    assert Path(between).read_bytes() == Path(layers[1]).read_bytes()
    assert client.predict("mambavision", handle_file(digit), 0, "both", api_name="/layer") is None


def test_a_video_and_its_stream(client, models, tmp_path):
    video = write_video(tmp_path / "a.mp4")
    args = "causal", handle_file(video)
    _, whole, _ = client.predict(*args, "gradcam", api_name="/video")
    job = client.submit(*args, api_name="/stream")
    job.result()
    steps = [confidences(label) for _, label, _ in job.outputs()]
    assert len(steps) == 4 and steps[0] != steps[-1]
    assert steps[-1] == pytest.approx(confidences(whole), rel=1e-4)  # the state carries what the whole clip says
    with pytest.raises(AppError, match="a stream needs a model of clips with directions='none'.*whole clips it can"):
        client.predict("both", handle_file(video), api_name="/stream")


def test_a_series(client, models, tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 2))
    path = write_table(tmp_path / "table.csv", values)
    plot, table = client.predict("tsm2", handle_file(path), api_name="/series")
    forecaster = models.series["tsm2"]
    x = (torch.from_numpy(values[10:42]).float() - forecaster.scaler.mean) / forecaster.scaler.std
    with torch.no_grad():
        forecast = forecaster.model(x[None])[0] * forecaster.scaler.std + forecaster.scaler.mean
    errors = np.abs(forecast.numpy() - values[42:]).mean(0)
    assert [row[0] for row in table["data"]] == ["a", "b"]
    assert [row[1] for row in table["data"]] == pytest.approx(errors, rel=1e-3)
    assert Image.open(plot).width > 300


def write_table(path, values):
    series = make_series(values)
    dates = np.datetime_as_string(series.dates, "s").tolist()
    write_csv(path, [{"date": date, "a": a, "b": b} for date, (a, b) in zip(dates, values.tolist(), strict=True)])
    return path


def test_the_speed(client, monkeypatch):
    monkeypatch.setattr("vim.demo.speed.PAIRS", {"vim_tiny and deit_tiny_patch16_224": ("test_vim", "test_vit")})
    job = client.submit("vim_tiny and deit_tiny_patch16_224", [224, 112], api_name="/speed")
    plot, table = job.result()
    assert [row[0] for row in table["data"]] == [112, 224] and len(job.outputs()) == 2
    assert all(figure > 0 for row in table["data"] for figure in row[1:])


def broken(folder):
    """Files that are none, by the function of the page that refuses them, and the sentence."""
    text = write_lines(folder / "note.png", "hello")
    large = folder / "large.png"
    Image.new("1", (8000, 5000)).save(large)
    yield "image", text, r"cannot read note.png as an image \(no image that Pillow knows\)"
    yield "image", write_truncated(folder / "cut.png"), "cannot read cut.png as an image"
    yield "image", large, r"large.png as an image \(it has 8000 x 5000 pixels: at most 33554432 expected\)"
    yield "video", text, "cannot read note.png as a video"
    yield "series", text, "note.png has no column beside|note.png has no column named date"
    yield "series", write_table(folder / "short.csv", np.ones((20, 2))), "short.csv has 20 rows: 40 expected"
    hours = [f"2020-01-01 {hour:02}:00,1" for hour in range(10)]
    yield "series", write_lines(folder / "b.csv", "date,a", *hours), "b.csv.* b"


def test_what_cannot_be_read_is_a_sentence(client, tmp_path):
    first = {"image": ("vim", "lrp"), "video": ("causal", "lrp"), "series": ("tsm2", None)}
    for name, path, sentence in broken(tmp_path):
        model, method = first[name]
        with pytest.raises(AppError, match=sentence) as error:
            client.predict(*filter(None, (model, handle_file(path), method)), api_name=f"/{name}")
        assert str(path.parent) not in str(error.value) and "vim_demo_" not in str(error.value)
        assert "Traceback" not in str(error.value)


def test_a_large_file_is_refused(client, tmp_path):
    path = tmp_path / "large.csv"
    path.write_bytes(bytes(2**20 + 1))
    with pytest.raises(Exception, match="(?i)size|413|large"):
        client.predict("tsm2", handle_file(path), api_name="/series")


def test_large_frames_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="has frames of 64 x 48 pixels: at most 1000 expected"):
        answer(models.videos["both"], str(write_video(tmp_path / "a.mp4")), "lrp")


def test_other_computers_are_not_answered(address):
    port = int(re.search(r":(\d+)", address)[1])
    socket.create_connection((app.HOST, port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)
    for name, status in ((f"localhost:{port}", 200), ("rebound.example", 400)):
        assert httpx.get(address, headers={"Host": name}, trust_env=False).status_code == status
    taken = pytest.raises(UserError, match=rf"port {port} cannot be opened \(Address already in use\)")
    with taken, app.serving(Models(), port):
        pass


def test_run_folders(tmp_path, caplog):
    for name in "ab":
        (tmp_path / name).mkdir()
    model = timm.create_model("test_vim", num_classes=2)
    write_run(tmp_path / "a/best.pth", model, "test_vim", "ab", num_classes=2)
    (tmp_path / "b/best.pth").write_bytes((tmp_path / "a/best.pth").read_bytes()[:1000])
    models = find(tmp_path)
    assert list(models.images) == ["a"] and not models.videos and not models.series
    assert re.search(told("left out: cannot read", "b/best.pth"), caplog.text)
    with pytest.raises(UserError, match="b/best.pth"):
        load([tmp_path / "b/best.pth"])


def test_published_weights_are_by_kind():
    images, videos = tags(videos=False), tags(videos=True)
    assert "vim_tiny.hustvl_in1k" in images or any(tag.startswith("vim_tiny.") for tag in images)
    assert any(tag.startswith("videomamba_tiny_f8.") for tag in videos)
    assert not set(images) & set(videos) and not any("mask_pt" in tag for tag in videos)


def test_mistakes_on_the_command_line(call, tmp_path):
    for words, message in (
        (["--port", 0], "--port must be from 1 to 65535, got 0"),
        (["--model", "vim_tiny"], "name the file too"),
        ([tmp_path / "nothing.pth"], "no such checkpoint"),
    ):
        status, output, errors = call("demo", *words)
        assert (status, output, errors.count("\n")) == (2, "", 1) and message in errors


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "window-size=1400,1000"]
QUIET += ["disable-background-networking", "disable-component-update", "disable-sync"]


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that logs its requests."""
    options = webdriver.ChromeOptions()
    for option in [*QUIET, f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in a browser, as a user sees it: what is hidden is not there."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)

    def shown(self, path):
        """The visible elements of an XPath."""
        with suppress(WebDriverException):  # one was replaced meanwhile
            return [one for one in self.driver.find_elements("xpath", path) if one.is_displayed()]
        return []

    def find(self, path):
        """The visible elements of an XPath, once there are some."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if found := self.shown(path):
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{path} in {self.driver.find_element('xpath', '//body').text}")

    def click(self, path):
        self.find(path)[0].click()

    def upload(self, path):
        """Put a file in the tab that is open."""
        self.find("//*[@role='tabpanel']//button[contains(., 'Drop File Here')]")
        inputs = self.driver.find_elements("xpath", "//*[@role='tabpanel']//input[@type='file']")
        panels = [one.find_element("xpath", "./ancestor::*[@role='tabpanel']").is_displayed() for one in inputs]
        inputs[panels.index(True)].send_keys(str(path))
        self.find("//*[@role='tabpanel']//a[contains(@href, 'file=')]")

    def picture(self, label, other_than=None):
        """The address of the picture under a label, once it is another."""
        path = f"//*[contains(@class, 'block')][.//label[contains(., '{label}')]]//img"
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with suppress(WebDriverException):
                if (source := self.find(path)[-1].get_attribute("src")) != other_than:
                    return source
            time.sleep(0.1)
        raise TimeoutError(f"the picture under {label} stays")

    def requests(self):
        """The addresses that the page has asked."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]


@pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium is not installed: apt-get install chromium chromium-driver"
)
def test_in_a_browser(browser, address, digit, tmp_path):
    page = Page(browser, address)
    # an image, and its maps
    page.upload(digit)
    page.find("//*[contains(., 'Likeliest classes')]//*[@data-testid='label-output-value']")
    first = page.picture("What the prediction rests on")
    layer = page.picture("What the layer takes")
    page.click("//label[normalize-space()='gradcam']")
    page.picture("What the prediction rests on", other_than=first)
    page.click("//label[normalize-space()='backward']")
    page.picture("What the layer takes", other_than=layer)
    # a file that is none
    page.click("//*[@role='tabpanel']//button[@aria-label='Clear']")
    page.upload(write_lines(tmp_path / "note.png", "hello"))
    page.find("//*[contains(@class, 'toast')][contains(., 'cannot read note.png as an image')]")
    # a video, whole and as a stream
    page.click("//button[@role='tab'][normalize-space()='Video']")
    page.upload(write_video(tmp_path / "a.mp4"))
    page.click("//button[normalize-space()='Whole clip']")
    whole = page.picture("Map, or prediction over time")
    page.click("//button[normalize-space()='Frame by frame']")
    page.picture("Map, or prediction over time", other_than=whole)
    # a series
    page.click("//button[@role='tab'][normalize-space()='Series']")
    page.upload(write_table(tmp_path / "table.csv", np.random.default_rng(0).normal(size=(50, 2))))
    page.click("//button[normalize-space()='Forecast the last rows']")
    page.picture("The held-out end and its forecast")
    # nothing but the demo itself was asked
    asked = {urlsplit(url) for url in page.requests()}
    assert {url.netloc for url in asked if url.scheme not in ("chrome", "chrome-untrusted", "data", "blob")} == {
        urlsplit(address).netloc
    }

"""Every way an image is stored decodes to the colours a viewer shows; everything else is an error that names the
row."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import struct
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from silkie.data import ImageError, ImageResolver, image_digest, load_preferences, open_image, to_rgb
from silkie.data.images import image_size
from tests.support import preference_files as files

RED, WHITE = (200, 30, 40), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int], tolerance: int = 0) -> bool:
    return image.mode == "RGB" and all(abs(a - b) <= tolerance for a, b in zip(image.getpixel(at), colour, strict=True))


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque red, right half fully transparent black."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 4, 4))
    return image.convert(mode)


def test_alpha_is_laid_over_white():
    image = open_image(encoded(half_transparent("RGBA")))
    assert near(image, (0, 0), RED) and near(image, (7, 0), WHITE)
    grey = open_image(encoded(half_transparent("LA")))
    assert near(grey, (7, 0), WHITE) and grey.getpixel((0, 0))[0] < 120


def test_palette_with_transparency_and_without():
    plain = Image.new("P", (4, 4), 1)
    plain.putpalette([0, 0, 0, *RED])
    assert near(open_image(encoded(plain)), (0, 0), RED)
    plain.putpixel((3, 3), 0)
    assert near(open_image(encoded(plain, transparency=0)), (3, 3), WHITE)
    assert near(open_image(encoded(plain, "GIF", transparency=0)), (3, 3), WHITE)


def test_palette_of_transparent_colours():
    """Some formats hold alpha in the palette, and nothing in `info` says so."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 255, 0, 0, 0, 0], "RGBA")
    image.putpixel((1, 0), 1)
    assert near(to_rgb(image), (0, 0), RED) and near(to_rgb(image), (1, 0), WHITE)


def test_premultiplied_alpha():
    grey = Image.new("LA", (2, 2), (10, 128))
    assert to_rgb(grey.convert("La")).getpixel((0, 0)) == to_rgb(grey).getpixel((0, 0)) == (132, 132, 132)
    assert to_rgb(half_transparent("RGBA").convert("RGBa")).getpixel((7, 0)) == WHITE


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (4, 4), RED)
    image.putpixel((1, 1), (1, 2, 3))
    decoded = open_image(encoded(image, transparency=(1, 2, 3)))
    assert near(decoded, (1, 1), WHITE) and near(decoded, (0, 0), RED)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(open_image(encoded(Image.fromarray(ramp))))[..., 0].reshape(-1)
    assert np.array_equal(decoded, np.rint(ramp.reshape(-1) / 257.0))


def test_float_and_integer_tiff():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [value[0] for value in np.asarray(open_image(encoded(unit, "TIFF")))[0]] == [0, 128, 255]
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.int32))
    assert [value[0] for value in np.asarray(open_image(encoded(deep, "TIFF")))[0]] == [0, 100, 255]
    big_endian = Image.fromarray(np.full((2, 2), 257 * 7, dtype=">u2"))
    assert open_image(encoded(big_endian, "TIFF")).getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(ImageError, match="row 3: pixel values from nan to nan in mode 'F'"):
        open_image(encoded(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "TIFF"), where="row 3")
    with pytest.raises(ImageError, match="row 3: pixel values from -5 to 5 in mode 'I': no known scale"):
        open_image(encoded(Image.fromarray(np.array([[-5, 5]], dtype=np.int32)), "TIFF"), where="row 3")


def test_cmyk_jpeg():
    assert near(
        open_image(encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)),
        (8, 8),
        RED,
        tolerance=6,
    )


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    assert (
        open_image(Image.new("RGB", (4, 4), WHITE).convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))).mode
        == "RGB"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """A picture whose stored pixels were turned for each orientation comes out as the one upright picture."""
    upright = files.picture(1, (12, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(encoded(stored, exif=exif)).tobytes() == upright.tobytes()


def test_broken_exif_leaves_the_pixels():
    data = encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    assert near(open_image(data), (4, 4), RED, tolerance=6)


def test_every_form_of_a_value(tmp_path):
    data, expected = files.png(3), files.picture(3).tobytes()
    path = tmp_path / "a.png"
    path.write_bytes(data)
    values = (
        data,
        path,
        str(path),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        files.picture(3),
    )
    assert all(open_image(value).tobytes() == expected for value in values)
    assert len({image_digest(value) for value in values[:-1]}) == 1
    assert {image_size(value) for value in values} == {(12, 8)}


def png_header(width: int, height: int) -> bytes:
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


DAMAGED = {
    "PNG": ("RGB", "RGBA", "P", "LA"),
    "JPEG": ("RGB", "CMYK", "L"),
    "GIF": ("P",),
    "TIFF": ("RGB", "P"),
    "BMP": ("RGB",),
    "ICO": ("RGBA",),
    "WEBP": ("RGB",),
    "AVIF": ("RGB",),
    "TGA": ("RGBA",),
    "PPM": ("RGB",),
    "JPEG2000": ("RGB",),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_of_any_format_is_an_image_or_an_image_error(kind):
    """Cut, and with changed bytes in its header and anywhere: nothing but ImageError leaves the two functions that open
    files."""
    chance = random.Random(0)
    for mode in DAMAGED[kind]:
        try:
            data = encoded(files.picture(0, (24, 24)).convert(mode), kind)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow writes no {kind}")
        for trial in range(150):
            damaged = bytearray(data[: chance.randrange(len(data))] if trial % 3 == 0 else data)
            for _ in range(chance.randrange(1, 5) if damaged else 0):
                damaged[chance.randrange(min(len(damaged), 120 if trial % 3 == 1 else len(damaged)))] = (
                    chance.randrange(256)
                )
            for function in (open_image, image_size):
                with contextlib.suppress(ImageError):
                    function(bytes(damaged), where="row 0")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (png_header(20_000, 20_000), "decompression bomb"),
        (png_header(10_000, 9_000), r"10000 x 9000 pixels, more than the 89,478,485 allowed"),
        (files.png(0)[:-60], "truncated or corrupt"),
        (encoded(files.picture(0, (64, 64)), "JPEG")[:-300], "truncated or corrupt"),
        (b"no image", "not an image that Pillow can read"),
        (b"", "not an image that Pillow can read"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "cannot read '/nowhere/x.png'"),
        ("zip://a.png::/nowhere.zip", "cannot read"),
        ("https://example.org/a.png", "remote address; load the data with allow_remote_images=True"),
        ("s3://bucket/a.png", "remote address"),
        (7, "found int, expected"),
    ],
)
def test_what_cannot_be_opened_names_the_row(value, words):
    with pytest.raises(ImageError, match=f"^row 12, image 0: .*{words}"):
        open_image(value, where="row 12, image 0")


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 9_000)])
def test_a_bomb_is_known_by_its_header(size):
    with pytest.raises(ImageError, match="^row 12, image 0: .*decompression bomb"):
        image_size(png_header(*size), where="row 12, image 0")


def test_a_missing_zip_member_and_a_broken_one(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.png", files.png(0))
    with pytest.raises(ImageError, match="row 1: cannot read 'zip://y.png"):
        open_image(f"zip://y.png::{path}", where="row 1")
    broken = tmp_path / "b.zip"
    broken.write_bytes(path.read_bytes().replace(files.png(0)[60:90], b"\0" * 30))
    with pytest.raises(ImageError, match="row 1: cannot read 'zip://x.png.*CRC"):
        open_image(f"zip://x.png::{broken}", where="row 1")


def test_a_file_that_unpacks_to_more_than_an_image_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.images.MAX_FILE_BYTES", 10**6)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(2 * 10**6))
    assert path.stat().st_size < 10**4
    with pytest.raises(
        ImageError, match="row 1: 'zip://x.png.* is 2,000,000 bytes, more than the 1,000,000 allowed; a zip bomb"
    ):
        open_image(f"zip://x.png::{path}", where="row 1")
    (tmp_path / "y.png").write_bytes(bytes(2 * 10**6))
    with pytest.raises(ImageError, match="row 1: .*y.png' is 2,000,000 bytes"):
        open_image(tmp_path / "y.png", where="row 1")


def test_a_replaced_archive_is_opened_anew(tmp_path):
    path = tmp_path / "a.zip"
    for seed in (0, 1):
        with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
            archive.writestr("x.png", files.png(seed))
        (tmp_path / "new.zip").replace(path)
        assert open_image(f"zip://x.png::{path}").tobytes() == files.picture(seed).tobytes()


def _read_members(path: str, queue) -> None:
    queue.put(
        [open_image(f"zip://{index}.png::{path}").tobytes() == files.picture(index).tobytes() for index in range(30)]
    )


def test_zip_members_are_right_in_forked_processes(tmp_path):
    """An inherited file offset would mix up the members."""
    path = str(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(30):
            archive.writestr(f"{index}.png", files.png(index))
    open_image(f"zip://0.png::{path}")
    context = get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_read_members, args=(path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(all(result) for result in results)


def test_data_uris_are_bytes():
    uri = "data:image/png;base64," + base64.b64encode(files.png(2)).decode()
    assert open_image(ImageResolver(None, None).resolve(uri)).tobytes() == files.picture(2).tobytes()


class OneImage(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200 if self.path == "/0.png" else 404)
        self.end_headers()
        if self.path == "/0.png":
            self.wfile.write(files.png(0))

    def log_message(self, *_):
        pass


def test_remote_images_are_fetched_once_on_request(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), OneImage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        row = {"image": f"http://127.0.0.1:{server.server_port}/0.png", "question": "Q", "chosen": "a", "rejected": "b"}
        path = files.write_lines(tmp_path / "rows.jsonl", [row])
        groups = load_preferences(path, allow_remote_images=True, cache_dir=tmp_path)
        assert groups[0]["images"][0]["bytes"] == files.png(0)
        load_preferences(path, allow_remote_images=True, cache_dir=tmp_path)
        assert OneImage.requests == 1
        files.write_lines(path, [{**row, "image": row["image"].replace("0.png", "1.png")}])
        with pytest.raises(ValueError, match="cannot fetch .*404"):
            load_preferences(path, allow_remote_images=True, cache_dir=tmp_path)
    finally:
        server.shutdown()
        server.server_close()

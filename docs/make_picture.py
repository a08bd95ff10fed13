"""Make docs/demo.png: moments of the bundled clip, as a browser shows them. Needs Debian's chromium and Pillow.

python -m jambatalk.infer -o demo.html && python docs/make_picture.py demo.html docs/demo.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

MOMENTS = (0.5, 1.17, 1.4, 2.87, 4.67, 5.4)  # seconds
SIZE, FACE = (640, 760), (60, 60, 580, 660)  # of the window; the part of it that is kept


def main(page: str, picture: str) -> None:
    tiles = []
    with tempfile.TemporaryDirectory() as scratch:
        for moment in MOMENTS:
            shot = Path(scratch, f"{moment}.png")
            subprocess.run(
                ["chromium", "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                 "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--hide-scrollbars", f"--user-data-dir={scratch}/profile", "--timeout=5000",
                 f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={shot}",
                 f"{Path(page).resolve().as_uri()}#t={moment}&zoom=1.4"],
                check=True, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            tiles.append(Image.open(shot).convert("RGB").crop(FACE).resize((260, 300), Image.Resampling.LANCZOS))
    strip = Image.new("RGB", (260 * len(tiles), 300))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (260 * i, 0))
    strip.quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

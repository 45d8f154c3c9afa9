"""The scatter's still pictures."""

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from stagediff.diff.section.static import RASTER_FROM, scatter_files
from stagediff.diff.spec import Cut


def pictures(builder, features: int) -> dict[str, bytes]:
    table, bounds = builder.diff_table(features, np.random.default_rng(0), Cut())
    return scatter_files(table, Cut(), bounds)


@pytest.mark.parametrize("features", [300, RASTER_FROM + 1])
def test_svg_and_png_are_pictures_and_reproducible(builder, features):
    first, second = pictures(builder, features), pictures(builder, features)
    assert first == second
    assert ET.fromstring(first["scatter.svg"]).tag.endswith("svg")
    image = Image.open(io.BytesIO(first["scatter.png"])).convert("RGB")
    assert image.size == (1440, 1300)
    colours = np.asarray(image).reshape(-1, 3).astype(int)
    red = np.abs(colours - [0xD1, 0x49, 0x5B]).max(1) < 60
    assert red.sum() > 200  # the selected features are there


def test_many_points_are_one_image_within_the_svg(builder):
    few, many = pictures(builder, 300)["scatter.svg"], pictures(builder, RASTER_FROM + 1)["scatter.svg"]
    assert b"<image" not in few
    assert b"<image" in many
    assert len(many) < 400_000


def test_labels_of_the_svg_are_text(builder):
    assert b"cos(D, F via D)" in pictures(builder, 300)["scatter.svg"]

"""Small real images: handwritten digits, which come with the package, and Fashion-MNIST."""

from __future__ import annotations

from tinyfusion_core.data import DataSource
from tinyfusion_core.hookspecs import hookimpl
from tinyfusion_images.digits import Digits
from tinyfusion_images.fashion import Fashion

__all__ = ["Digits", "Fashion"]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    return [Digits, Fashion]

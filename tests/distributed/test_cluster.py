"""The private Ray that raymerge starts on one machine."""

from __future__ import annotations

import os

from commands import python

CODE = """
import os, ray
from raymerge.distributed.cluster import connect
with connect(None, 1):
    print(ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


def test_workers_of_a_private_ray_are_not_nice():
    """Ray's default is 15, with which they starve beside any other program."""
    ran = python(CODE)
    assert ran.stderr.split()[-1] == str(os.nice(0)), ran.stderr

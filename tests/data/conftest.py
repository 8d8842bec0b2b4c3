"""A tiny data set of every kind."""

import pytest
from image_sets import encoded, write_folder, write_parquet, write_shards


@pytest.fixture
def folder(tmp_path):
    """Twenty images of three classes, 16 × 12 pixels."""
    return write_folder(tmp_path / "images", 20, (16, 12))


@pytest.fixture
def parquet(tmp_path):
    """A folder of two training files of 13 rows and a test file of 5, 12 × 12 pixels."""
    home = tmp_path / "parquet"
    for part in range(2):
        numbers = range(13 * part, 13 * part + 13)
        write_parquet(home / f"train-{part}.parquet", [encoded(n) for n in numbers], [n % 3 for n in numbers])
    write_parquet(home / "test.parquet", [encoded(n) for n in range(40, 45)], [0, 1, 2, 0, 1])
    return home


@pytest.fixture
def shards(tmp_path):
    """Three shards of 7 images, 12 × 12 pixels."""
    return write_shards(tmp_path / "shards", 21, 3)


@pytest.fixture
def no_network(monkeypatch):
    """Any connection is a failure."""
    import socket

    tried = []

    def refuse(*arguments, **named):
        tried.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried

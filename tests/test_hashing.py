import hashlib

import pytest
import xxhash

from vlscale import hashing


@pytest.mark.parametrize("algorithm", [hashlib.sha256, xxhash.xxh64])
@pytest.mark.parametrize("size", [0, 7, 8, 9, 16])
def test_a_file_hashes_as_its_bytes_do_wherever_a_piece_ends(tmp_path, monkeypatch, algorithm, size):
    monkeypatch.setattr(hashing, "_CHUNK", 8)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(size)))
    assert hashing.file_digest(path, algorithm) == algorithm(path.read_bytes()).hexdigest()

"""What is known of a finished shard."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = bytes  # `Record.bytes` hides the type inside the class
FOLDER = "records"
FAILED = "failed"


@dataclass(frozen=True)
class Record:
    """One shard that is done.

    Attributes:
        shard: its number.
        first, count: images first .. first + count - 1.
        bytes: of the file, or of all files of a folder.
        sha256: of the file; of a folder that of its files' names and hashes.
        fingerprint: of the machine, by name; see ``machine.fingerprint``.
        host: where it was made.
        seconds: that took.
        writer_wait: seconds of them in which sampling was held up by the writer.
        attempt: 1 for the first.
        crc32: of every image as it lies in the shard, uint32 in little-endian order, base64.
    """

    shard: int
    first: int
    count: int
    bytes: int
    sha256: str
    fingerprint: dict[str, str]
    host: str
    seconds: float
    writer_wait: float
    attempt: int
    crc32: str

    @property
    def images_per_s(self) -> float:
        """Finished images per second of this worker."""
        return self.count / self.seconds if self.seconds > 0 else 0.0

    def checksums(self) -> NDArray[np.uint32]:
        """crc32 of each image's bytes, uint32 [count]; ValueError where they are damaged."""
        found = np.frombuffer(base64.b64decode(self.crc32, validate=True), dtype="<u4")
        if len(found) != self.count:
            raise ValueError(f"{self.count} images, {len(found)} checksums")
        return found

    def to_json(self) -> Bytes:
        """The content of records/NNNNNN.json; the long field comes last."""
        fields = asdict(self)
        crc32 = fields.pop("crc32")
        fields |= {"images_per_s": round(self.images_per_s, 3), "crc32": crc32}
        return (json.dumps(fields) + "\n").encode()

    @classmethod
    def from_json(cls, content: Bytes, where: str = "a record") -> Record:
        """Raises ValueError that names ``where`` for what `to_json` did not write.

        Of the checksums only the length is looked at, which is enough for a file that was cut off:
        whoever reads 10^5 records does not decode as many images' checksums.
        """
        try:
            fields: dict[str, Any] = json.loads(content)
            fields.pop("images_per_s", None)
            record = cls(**fields)
            if record.count < 1 or len(record.crc32) != -(-4 * record.count // 3) * 4:
                raise ValueError(f"{record.count} images, {len(record.crc32)} letters of checksums")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        return record


def pack(checksums: Sequence[int]) -> str:
    """Checksums as a record keeps them."""
    return base64.b64encode(np.array(checksums, dtype="<u4").tobytes()).decode("ascii")

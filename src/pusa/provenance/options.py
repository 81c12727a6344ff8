"""Choose how results are marked beyond their metadata: with a signature, a watermark, or neither."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pusa.provenance.c2pa import Signer

NO_WATERMARK = "none"


@dataclass(frozen=True, kw_only=True)
class MarkOptions:
    """Name the certificate to sign with and the watermark to embed; plain, for other processes.

    Attributes:
        sign_cert, sign_key: PEM files of a certificate with its chain and of its private key; None does not sign.
        timestamp_url: address of a time stamp authority; None asks none.
        watermark: as `pusa.provenance.watermark.load_watermarker` takes it. None, and "none" where a file is made again
            that has one, embed none.
    """

    sign_cert: str | None = None
    sign_key: str | None = None
    timestamp_url: str | None = None
    watermark: str | None = None

    def check(self) -> None:
        """Load what is named, so that a result is never left unmarked without anybody knowing.

        Raises ValueError, FileNotFoundError and RuntimeError, with the way out.
        """
        self.signer()
        if self.watermark not in (None, NO_WATERMARK):
            from pusa.provenance.watermark import load_watermarker

            load_watermarker(self.watermark)

    def signer(self) -> "Signer | None":
        """Load the certificate; None without one. Raises as `pusa.provenance.c2pa.Signer` does."""
        if self.sign_cert is None and self.sign_key is None:
            if self.timestamp_url is not None:
                raise ValueError("a time stamp is part of a signature: give sign_cert and sign_key too")
            return None
        if self.sign_cert is None or self.sign_key is None:
            missing = "sign_key" if self.sign_key is None else "sign_cert"
            raise ValueError(f"{missing} is missing: a certificate and its key are given together")
        from pusa.provenance.c2pa import Signer

        return Signer(
            Path(self.sign_cert).expanduser(), Path(self.sign_key).expanduser(), timestamp_url=self.timestamp_url
        )

"""Make a root certificate of one's own and a signing certificate under it, as C2PA's profile asks.

Other people's readers show such a root as unknown unless it is given to them; only a certificate of an authority on
C2PA's trust list is known everywhere.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

_CERTIFICATE, _KEY, _ROOT = "certificate.pem", "key.pem", "root.pem"


def new_certificate(folder: Path, *, organization: str, days: int = 3650) -> dict[str, Path]:
    """Write ``certificate.pem`` (with its chain), ``key.pem`` (for its owner's eyes only) and ``root.pem``.

    The root's key is thrown away: it signs this one certificate.

    Args:
        folder: made if missing.
        organization: the name that readers show as the signer.
        days: time until the certificate expires, 1..36500.

    Returns:
        The paths as "certificate", "key" and "root".

    Raises:
        RuntimeError: the package ``cryptography`` is not installed.
        FileExistsError: a file is there already.
        ValueError: a value is out of range.
    """
    if not organization.strip() or len(organization) > 64:
        raise ValueError(f"organization={organization[:80]!r}: give a name of 1 to 64 characters")
    if not 1 <= days <= 36500:
        raise ValueError(f"days={days} is outside 1..36500")
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    except ImportError as error:
        raise RuntimeError("certificates need cryptography: install it with pip install 'pusa[c2pa]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"certificate": folder / _CERTIFICATE, "key": folder / _KEY, "root": folder / _ROOT}
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already: name another folder, or remove it")
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _certificate(f"{organization} root", organization, root_key, None, days + 1)
    leaf = _certificate(f"{organization} media", organization, key, (root, root_key), days)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(os.open(paths["key"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
    paths["certificate"].write_bytes(leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
    paths["root"].write_bytes(root.public_bytes(Encoding.PEM))
    return paths


def _certificate(name: str, organization: str, key: Any, issuer: tuple[Any, Any] | None, days: int) -> Any:
    """Make a certificate of P-256: a root if `issuer` (certificate and key) is None, else one that signs media."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),
        ]
    )
    is_root = issuer is None
    issuer_key = key if issuer is None else issuer[1]
    now = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    usages = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_root,
                key_cert_sign=is_root,
                crl_sign=is_root,
                decipher_only=False,
                **dict.fromkeys(usages, False),
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())

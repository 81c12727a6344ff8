"""Sign files with C2PA manifests, and read and verify the manifests of files: ``pip install 'pusa[c2pa]'``.

A signature covers every byte of the file, so it comes last: a program that rewrites the file afterwards breaks or drops
it. Nothing is fetched from a network, except a time stamp where an authority is named.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pusa import __version__, media
from pusa.media.source import DEFAULT_LIMITS, one_line, open_source
from pusa.provenance.xmp import SOURCE_TYPES

_TYPES = {
    "mov": "video/mp4",
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "gif": "image/gif",
    "avi": "video/avi",
}
# No thumbnails: they would show what was cut away. No fetching: a manifest may name any address.
_SETTINGS: dict[str, Any] = {
    # What was signed here is not read again at once: that takes a fifth of signing, and tests read it.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": False, "verify_after_sign": False},
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Ingredient:
    """Describe an input of a result.

    Attributes:
        title: its name.
        relationship: ``parentOf``, ``componentOf`` or ``inputTo``, in C2PA's words.
        content_type: as `content_type_of` returns it.
        sha256: of its content, or empty.
        signed: the file, if it has manifests, which are kept; else None, as c2pa would copy identifiers and addresses
            from its XMP.
    """

    title: str
    relationship: str
    content_type: str
    sha256: str
    signed: Path | None = None


@dataclass(frozen=True)
class Validation:
    """Report the check of a file's manifest.

    Attributes:
        state: "trusted" (valid, by a root that was given), "valid" (untouched since it was signed, by somebody),
            "invalid" (changed, or wrongly signed) or "none" (no manifest).
        manifests: the manifest store as c2pa's reader reports it; empty for "none".
        problems: one line for each failed check.
    """

    state: str
    manifests: dict[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def active(self) -> dict[str, Any]:
        """The manifest of the file itself; the others are those of its ingredients."""
        return self.manifests.get("manifests", {}).get(self.manifests.get("active_manifest"), {})


class Signer:
    """Sign files with a certificate and its private key.

    Args:
        certificate: PEM file: the signing certificate, then those up to the root.
        key: PEM file (PKCS 8) of its private key, without a password.
        timestamp_url: address of a time stamp authority (RFC 3161); without one a signature counts until its
            certificate expires.

    Raises:
        RuntimeError: c2pa is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file holds something else, or the key is not the certificate's.
    """

    def __init__(self, certificate: Path, key: Path, timestamp_url: str | None = None) -> None:
        c2pa = _import()
        self._certificate, self._key = _read(certificate, "certificate"), _read(key, "key")
        algorithm = _check_pair(certificate, self._certificate, key, self._key)
        self._info = c2pa.C2paSignerInfo(
            alg=algorithm.encode(),
            sign_cert=self._certificate,
            private_key=self._key,
            ta_url=timestamp_url.encode() if timestamp_url else None,
        )

    def sign(
        self, path: Path, *, source_type: str, system: str = "", ingredients: Sequence[Ingredient] = (), title: str = ""
    ) -> None:
        """Sign a file in place. It is replaced by its signed copy at once, or left as it is after an error.

        Args:
            source_type: digital source type by its short name.
            system: the AI system, as the software that acted.
            ingredients: inputs; the manifests that they carry are kept in the new one.
            title: of the file; empty keeps it out.

        Raises:
            ValueError: the format cannot be signed.
            RuntimeError: signing failed, as where the time stamp authority does not answer.
        """
        c2pa = _import()
        content_type = content_type_of(path)
        signed = path.with_name(f".{path.name}.signed")
        try:
            context = c2pa.Context.from_dict(_SETTINGS)
            builder = c2pa.Builder(_manifest(content_type, source_type, system, ingredients, title), context)
            for number, ingredient in enumerate(ingredients):
                if ingredient.signed is not None:
                    with ingredient.signed.open("rb") as file:
                        builder.add_ingredient(_facts(number, ingredient), ingredient.content_type, file)
            with path.open("rb") as file, signed.open("w+b") as target:
                builder.sign(c2pa.Signer.from_info(self._info), content_type, file, target)
            os.replace(signed, path)
        except c2pa.C2paError as error:
            raise RuntimeError(f"{path.name} was not signed: {one_line(error)}") from error
        finally:
            signed.unlink(missing_ok=True)


def validate(path: Path, *, trust: Path | None = None) -> Validation:
    """Read and check the manifests of a file (of a folder of pictures: the first one).

    Args:
        trust: PEM file of root certificates; a valid signature under one of them is "trusted".

    Raises:
        RuntimeError: c2pa is not installed.
        ValueError: the file is of a kind that carries no manifest.
        FileNotFoundError: a file is missing.
    """
    c2pa = _import()
    path = media.first_picture(path) if path.is_dir() else path
    settings = dict(_SETTINGS)
    if trust is not None:
        anchors = _read(trust, "root certificate").decode()
        settings |= {"verify": {**settings["verify"], "verify_trust": True}, "trust": {"trust_anchors": anchors}}
    content_type = content_type_of(path)
    with path.open("rb") as file:
        try:
            reader = c2pa.Reader.try_create(content_type, file, context=c2pa.Context.from_dict(settings))
            if reader is None:
                return Validation("none", {})
            manifests = json.loads(reader.json())
        except c2pa.C2paError as error:
            return Validation("invalid", {}, (one_line(error),))
    results = manifests.get("validation_results", {}).get("activeManifest", {})
    problems = tuple(f"{failure['code']}: {failure.get('explanation', '')}" for failure in results.get("failure", []))
    return Validation(str(manifests.get("validation_state", "invalid")).lower(), manifests, problems)


def content_type_of(source: Path | BinaryIO) -> str:
    """Return the media type of a file by its content. Raises ValueError for one that carries no manifest."""
    with open_source(source, limits=DEFAULT_LIMITS, what="file") as opened:
        decoder, kind = opened.kind.decoder, opened.kind.name
    if decoder not in _TYPES:
        raise ValueError(f"{kind} carries no C2PA manifest: mp4, PNG, JPEG, WebP, GIF and AVI do")
    return _TYPES[decoder]


def _import() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise RuntimeError("content credentials need c2pa: install it with pip install 'pusa[c2pa]'") from error
    return c2pa


def _manifest(
    content_type: str, source_type: str, system: str, ingredients: Sequence[Ingredient], title: str
) -> dict[str, Any]:
    agent = {"softwareAgent": {"name": system, "version": __version__}} if system else {}
    parents = [_label(n) for n, i in enumerate(ingredients) if i.relationship == "parentOf"]
    others = [_label(n) for n, i in enumerate(ingredients) if i.relationship == "inputTo"]
    placed = [_label(n) for n, i in enumerate(ingredients) if i.relationship == "componentOf"]
    made: dict[str, Any] = {"digitalSourceType": f"{SOURCE_TYPES}{source_type}", **agent}
    if others:
        made["parameters"] = {"ingredientIds": others}
    actions: list[dict[str, Any]] = [{"action": "c2pa.edited" if parents else "c2pa.created", **made}]
    if parents:
        actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": parents}})
    if placed:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": placed}})
    return {
        "claim_generator_info": [{"name": "pusa", "version": __version__}],
        "format": content_type,
        **({"title": title} if title else {}),
        "ingredients": [_facts(n, i) for n, i in enumerate(ingredients) if i.signed is None],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _facts(number: int, ingredient: Ingredient) -> dict[str, str]:
    facts = {"title": ingredient.title, "relationship": ingredient.relationship, "label": _label(number)}
    if ingredient.signed is None:
        facts["format"] = ingredient.content_type
        if ingredient.sha256:
            facts["instance_id"] = f"urn:sha256:{ingredient.sha256}"
    return facts


def _label(number: int) -> str:
    return f"input_{number}"


def _read(path: Path, what: str) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {str(path)!r} does not exist: `pusa provenance new-cert` makes one")
    return path.read_bytes()


def _check_pair(certificate: Path, certificate_pem: bytes, key: Path, key_pem: bytes) -> str:
    """Return the signature algorithm of a key. Raises ValueError if it does not belong to the certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        leaf = x509.load_pem_x509_certificates(certificate_pem)[0]
    except ValueError as error:
        raise ValueError(f"{certificate} holds no certificate in PEM: `pusa provenance new-cert` makes one") from error
    try:
        private_key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} holds no private key in PEM without a password") from error
    if leaf.public_key() != private_key.public_key():
        raise ValueError(f"the key {key} is not that of the certificate {certificate}: give both of one pair")
    match private_key:
        case ec.EllipticCurvePrivateKey():
            sizes = {256: "es256", 384: "es384", 521: "es512"}
            algorithm = sizes.get(private_key.curve.key_size)
        case ed25519.Ed25519PrivateKey():
            algorithm = "ed25519"
        case rsa.RSAPrivateKey():
            algorithm = "ps256"
        case _:
            algorithm = None
    if algorithm is None:
        raise ValueError(f"{key}: C2PA signs with ECDSA on P-256, P-384 or P-521, Ed25519 or RSA keys only")
    return algorithm

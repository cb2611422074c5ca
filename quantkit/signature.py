"""Signatures of whole artifacts with a key of one's own, in the format of OpenSSF Model Signing; no network is used.

The signature is a Sigstore bundle, so that `model_signing verify key` reads it without quantkit.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import RefusedError, UnavailableError

SIGNATURE = "model.sig"
SIGNATURES = ".signatures"  # of branches; the signature of a folder that is one branch lies in it
INSTALL = 'pip install "quantkit[sign]"'


def sign(folder: Path, private_key: Path, signature: Path) -> None:
    """Sign every file of a folder.

    Args:
        folder: holds the files to sign and nothing else; links are followed.
        private_key: PEM of an elliptic curve key without a password.
        signature: to be written; not in `folder`.

    Raises:
        RefusedError: the key cannot be used.
        UnavailableError: model-signing is not installed.
    """
    hashing, signing, _ = _library()
    require_key(private_key, "--sign")
    fix = "give an elliptic curve key without a password as PEM: openssl ecparam -name prime256v1 -genkey -noout"
    with _taking(private_key, "sign", fix):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(hashing.Config().set_allow_symlinks(True)).sign(folder, signature)


def problem(folder: Path, signature: Path, public_key: Path, *, covers: tuple[str, ...]) -> str | None:
    """Why a signature does not hold; None if it does.

    Files that were not signed are no problem here: the record, which is signed, knows every file.

    Args:
        folder: the signed files.
        signature: of them.
        public_key: PEM.
        covers: files that must be among those signed.

    Raises:
        RefusedError: the key cannot be read.
        UnavailableError: model-signing is not installed.
    """
    hashing, _, verifying = _library()
    require_key(public_key, "--public-key")
    with _taking(public_key, "verify", "give the public part of an elliptic curve key as PEM: openssl ec -pubout"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    config.set_hashing_config(hashing.Config().set_allow_symlinks(True)).set_ignore_unsigned_files(True)
    try:
        config.verify(folder, signature)
    except (ValueError, KeyError, OSError) as error:
        # the bytes of both hashes say nothing that the name does not
        return str(error).partition(": Expected ")[0] or type(error).__name__
    unsigned = [name for name in covers if name not in _signed_names(signature)]
    return f"not signed: {', '.join(unsigned)}" if unsigned else None


def public_part(private_key: Path, target: Path) -> Path:
    """Write the public part of a private key as PEM; returns `target`."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    target.write_bytes(key.public_key().public_bytes(encoding, form))
    return target


def _signed_names(signature: Path) -> set[str]:
    bundle = json.loads(signature.read_text(encoding="utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def require_key(key: Path, option: str) -> None:
    """Stop where there is no file for a key that an option names.

    Raises:
        RefusedError: naming both.
    """
    if not key.is_file():
        raise RefusedError(f"no such key: {key}", where=option, fix="give the file of a PEM key")


@contextmanager
def _taking(key: Path, what: str, fix: str) -> Iterator[None]:
    """Turn a key that model-signing does not take into an error with a remedy."""
    try:
        yield
    # it asks a key of another kind for its curve
    except (ValueError, TypeError, AttributeError) as error:
        reason = "it is no elliptic curve key" if isinstance(error, AttributeError) else error
        raise RefusedError(f"the key cannot {what}: {reason}", where=str(key), fix=fix) from None


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise UnavailableError("model-signing is not installed", where="signing", fix=INSTALL) from None
    return hashing, signing, verifying

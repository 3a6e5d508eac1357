"""Signatures over a run: who holds the key says which files belong together and what they cost.

An in-toto Statement (v1) names the files by their SHA-256 and holds the privacy statement, with epsilon recomputed from
the ledger; a DSSE envelope signs it with Ed25519. What is written follows
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, so that other tools can check it.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from synthward import __version__
from synthward.data.manifest import MANIFEST_FILE, check_dataset, read_manifest
from synthward.engine import Ledger
from synthward.engine.errors import CheckpointError, ConfigError, DataError, OutputError, PrivacyError
from synthward.engine.files import sync_file
from synthward.run.folder import (
    ENCODER_FILE,
    LEDGER_FILE,
    MODEL_FILE,
    RUN_FILE,
    SCHEMA_FILE,
    RunFolder,
    write_atomic,
)

ATTESTATION_FILE = "attestation.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:synthward:privacy-statement:v1"
# Of a run: what is released or says what was.
RUN_FILES = (MODEL_FILE, ENCODER_FILE, SCHEMA_FILE, RUN_FILE, LEDGER_FILE)
AUDIT_FILE = "audit.json"
_LIBRARIES = ("cryptography", "dp-accounting", "numpy", "torch")
# Epsilon is computed anew; a library's last bits may differ between machines.
_TOLERANCE = 1e-6


def new_key(path: Path) -> Path:
    """Write a fresh Ed25519 key pair: ``path`` (mode 0600) and, beside it, the public key, which is returned.

    Raises:
        OutputError: one of the files exists, or can not be written; then neither is left behind.
    """
    public = path.with_suffix(".pub.pem")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    made: list[Path] = []
    try:
        for file, data, mode in ((path, secret, 0o600), (public, _pem(key.public_key()), 0o644)):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(file)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                sync_file(handle)
    except OSError as error:
        # Half a pair is of no use, and would be in the way of the next attempt.
        for written in made:
            written.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise OutputError(f"{file}: exists already; a key is never overwritten") from None
        raise OutputError(f"{file}: can not be written ({error.strerror})") from None
    return public


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What DSSE signs: ``DSSEv1 LEN(type) type LEN(payload) payload``, lengths in bytes, decimal."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign_run(run: Path, key_file: Path, cohorts: Sequence[Path] = ()) -> Path:
    """Sign a finished run and cohorts made from it (files, or folders of parts, by their manifests).

    Returns the envelope's path, in the run's folder.

    Raises:
        CheckpointError: the run is unfinished. ConfigError: no usable key. LedgerError: the ledger is damaged.
    """
    folder = RunFolder(run)
    if not folder.is_complete:
        raise CheckpointError(f"{run}: training is unfinished; finish it with `synthward fit --resume`")
    key = _private_key(key_file)
    # What an audit found is shown in the privacy statement, so that it is vouched for like the rest.
    audits = [folder.path / AUDIT_FILE] if (folder.path / AUDIT_FILE).is_file() else []
    files = [folder.path / name for name in RUN_FILES] + audits + [_named(cohort) for cohort in cohorts]
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ConfigError("--cohort: two files have the same name; rename one, so that each can be told")
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.name, "digest": {"sha256": _sha256(file)}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": _predicate(folder.ledger_path),
    }
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    target = folder.path / ATTESTATION_FILE
    write_atomic(target, (json.dumps(envelope, indent=1) + "\n").encode())
    return target


def verify_run(run: Path, public_key: Path | None = None, cohorts: Sequence[Path] = ()) -> dict[str, Any]:
    """Check a run's signature, every file that it names, and its epsilon.

    Args:
        public_key: PEM file of the signer. Without it, the signature is not checked: whoever could change the files
            could have made it.
        cohorts: where signed cohorts (files, or folders of parts) lie, if not in the run's folder or beside it.

    Returns:
        The signed predicate, with ``signed`` (whether a signature was checked), ``key_id``, ``files``, and
        ``not_signed``: what else lies in the run's folder, for which nobody vouches.

    Raises:
        PrivacyError: whatever does not match, by name.
    """
    folder = RunFolder(run)
    envelope_file = folder.path / ATTESTATION_FILE
    key = None if public_key is None else _public_key(public_key)
    statement = _open_envelope(envelope_file, key)
    places = {_named(cohort).name: cohort for cohort in cohorts}
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    for name in RUN_FILES:
        if name not in subjects:
            raise PrivacyError(f"{envelope_file}: does not say which {name} belongs to the run")
    for name in places:
        if name not in subjects:
            raise PrivacyError(f"{places[name]}: is not named by {envelope_file}")
    for name, digest in subjects.items():
        for found in _locate(folder.path, name, places):
            if _sha256(found) != digest:
                raise PrivacyError(f"{found}: is not the file that was signed (its SHA-256 differs)")
    _check_predicate(envelope_file, statement["predicate"], _predicate(folder.ledger_path))
    signer = None if key is None else key_id(key)
    others = {file.name for file in folder.path.iterdir()} - {*subjects, ATTESTATION_FILE}
    found_out = {"signed": key is not None, "key_id": signer, "files": list(subjects)}
    return {**statement["predicate"], **found_out, "not_signed": sorted(others)}


def key_id(key: Ed25519PublicKey) -> str:
    """Names a key: SHA-256 of its SubjectPublicKeyInfo (DER), hex."""
    info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(info).hexdigest()


def _predicate(ledger_path: Path) -> dict[str, Any]:
    """The privacy statement, from the ledger alone."""
    with Ledger.open(ledger_path, readonly=True) as ledger:
        header, epsilon = ledger.header, ledger.epsilon()
        return {
            "run_id": header["run_id"],
            "unit": header["unit"],
            "relation": header["relation"],
            "epsilon": "inf" if math.isinf(epsilon) else epsilon,
            "delta": header["delta"],
            "accountant": header["accountant"],
            "private": ledger.is_private,
            "ledger": {"head": ledger.head, "lines": len(ledger.lines)},
            "events": [event.to_dict() for event in ledger.events()],
            "versions": _versions(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"synthward": __version__, "python": platform.python_version(), **libraries}


def _check_predicate(file: Path, signed: dict[str, Any], now: dict[str, Any]) -> None:
    """The signed statement against what the ledger says; time and versions are the signer's."""
    if set(signed) != set(now):
        raise PrivacyError(f"{file}: its privacy statement has unknown or missing fields")
    claimed, found = signed["epsilon"], now["epsilon"]
    same = claimed == found or (
        isinstance(claimed, float)
        and isinstance(found, float)
        and math.isclose(claimed, found, rel_tol=_TOLERANCE)
    )
    if not same:
        raise PrivacyError(f"{file}: says epsilon {claimed}, but the ledger adds up to {found}")
    for name in sorted(set(now) - {"epsilon", "versions", "time"}):
        if signed[name] != json.loads(json.dumps(now[name])):
            raise PrivacyError(f"{file}: its {name} is not what the ledger says")


def _open_envelope(file: Path, key: Ed25519PublicKey | None) -> dict[str, Any]:
    """The statement inside, after its signature was checked (if there is a key to check with)."""
    try:
        envelope = json.loads(file.read_bytes())
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]]
        payload_type = envelope["payloadType"]
    except FileNotFoundError:
        raise PrivacyError(f"{file}: is missing; the run was not signed (`synthward sign`)") from None
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise PrivacyError(f"{file}: is no DSSE envelope, or damaged") from None
    if payload_type != PAYLOAD_TYPE:
        raise PrivacyError(f"{file}: holds no in-toto statement")
    if key is not None and not any(_is_signed(key, s, payload_type, payload) for s in signatures):
        raise PrivacyError(f"{file}: no signature in it is by this key over this content")
    try:
        statement: dict[str, Any] = json.loads(payload)
        kinds = (statement["_type"], statement["predicateType"])
        subjects = [(s["name"], s["digest"]["sha256"]) for s in statement["subject"]]
        # Raises for what is no object; names are those of files, never paths.
        is_whole = bool(dict(statement["predicate"])) and all(
            isinstance(name, str) and isinstance(digest, str) and Path(name).name == name
            for name, digest in subjects
        )
        is_whole = is_whole and len({name for name, _ in subjects}) == len(subjects)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PrivacyError(f"{file}: its statement can not be read") from None
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE) or not is_whole:
        raise PrivacyError(f"{file}: is no privacy statement of this version")
    return statement


def _is_signed(key: Ed25519PublicKey, signature: bytes, payload_type: str, payload: bytes) -> bool:
    try:
        key.verify(signature, pre_authentication_encoding(payload_type, payload))
    except InvalidSignature:
        return False
    return True


def _locate(folder: Path, name: str, places: dict[str, Path]) -> list[Path]:
    """Where a signed file lies. A cohort may be in the folder and beside it: whichever is used has to be the one."""
    if name in (*RUN_FILES, AUDIT_FILE):
        return [folder / name]
    if name in places:
        return [places[name]]
    found = [place for place in (folder / name, folder.absolute().parent / name) if place.exists()]
    if not found:
        raise PrivacyError(
            f"{name}: was signed with the run and is not here; say where it lies with --cohort FILE"
        )
    return found


def _named(cohort: Path) -> Path:
    """The path with its last name, which ``.`` does not have."""
    return cohort if cohort.name else cohort.absolute()


def _sha256(file: Path) -> str:
    """Of a file; of a cohort in parts that of its manifest, when every part is the one that the manifest names."""
    try:
        if file.is_dir():
            if read_manifest(file) is None:
                raise ConfigError(f"{file}: is a folder without a manifest; name each file of the cohort")
            check_dataset(file)
            file = file / MANIFEST_FILE
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except DataError as error:
        raise PrivacyError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{file}: can not be read ({error.strerror})") from None


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _private_key(file: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(_read_key(file), password=None)
    except TypeError:
        raise ConfigError(
            f"{file}: is encrypted; give a key without a passphrase, for example by `openssl pkey`"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{file}: holds no private key; make one with `synthward sign --new-key`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file}: is of another kind; Ed25519 is needed (`synthward sign --new-key`)")
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(_read_key(file))
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{file}: holds no public key (PEM)") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{file}: is of another kind; an Ed25519 key is needed")
    return key


def _read_key(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: can not be read ({error.strerror})") from None

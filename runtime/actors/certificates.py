"""The certificates of a cluster's gRPC: one small authority a cluster, one certificate a host."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from runtime.actors.security import CA, CA_KEY, CERTIFICATE, KEY, write_private

YEARS = 5
_DAY = datetime.timedelta(days=1)


def make_authority(folder: Path, name: str) -> None:
    """The folder holds ca.crt and its key: made once, because every host's certificate hangs on it."""
    if (folder / CA_KEY).is_file() and (folder / CA).is_file():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(f"trueweight cluster {name}")
    made = (
        _draft(subject, subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(folder / CA_KEY, _pem_of_key(key))
    write_private(folder / CA, _pem(made))


def issue(authority: Path, target: Path, name: str, addresses: Sequence[str]) -> None:
    """`target` holds ca.crt, and host.crt and host.key for these addresses; kept where they are good for 30 more days.

    A node's certificate serves both sides of a connection: Ray asks for one from clients too.
    """
    ca = x509.load_pem_x509_certificate((authority / CA).read_bytes())
    signer = serialization.load_pem_private_key((authority / CA_KEY).read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    # Ray reaches its own processes over loopback too.
    names = x509.SubjectAlternativeName(_general_names(("127.0.0.1", "localhost", *addresses)))
    if _still_good(target, ca, names):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        _draft(_named(name), ca.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(names, critical=False)
        .sign(signer, hashes.SHA256())
    )
    write_private(target / KEY, _pem_of_key(key))
    write_private(target / CERTIFICATE, _pem(made))
    write_private(target / CA, _pem(ca))


def _still_good(target: Path, ca: x509.Certificate, names: x509.SubjectAlternativeName) -> bool:
    try:
        found = x509.load_pem_x509_certificate((target / CERTIFICATE).read_bytes())
        found.verify_directly_issued_by(ca)
        same = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == names
        key = serialization.load_pem_private_key((target / KEY).read_bytes(), password=None)
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    fits = same and key.public_key() == found.public_key()
    return fits and found.not_valid_after_utc > _now() + 30 * _DAY


def _general_names(addresses: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for address in dict.fromkeys(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    return names


def _draft(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    made = made.serial_number(x509.random_serial_number())
    return made.not_valid_before(_now() - _DAY).not_valid_after(_now() + YEARS * 365 * _DAY)  # hosts' clocks differ


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()

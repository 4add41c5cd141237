"""Strings that look like feedback tokens and are none, for `benchmarks/tokens.py`; and two broken checkers that take some of them."""

from __future__ import annotations

import base64
import binascii
import random
from collections.abc import Callable, Iterator, Sequence

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pydantic import ValidationError

from feedback.tokens import Claims, Tokens

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
FOREIGN = "!\n\r\t \x00=+/.,:;%é\u0410\ud800"
IV = slice(9, 25)
"""Version byte and time come first."""
MAC_BYTES = 32


class Forger:
    """Draws forgeries from genuine tokens. A drawn string is never one of them. Keys and ways are drawn by the seed; a token's own IV and
    time are `cryptography`'s, so the strings differ from run to run."""

    def __init__(self, key: bytes, genuine: Sequence[str], seed: int) -> None:
        self.draw = random.Random(seed)
        self.genuine = genuine
        self.held = frozenset(genuine)
        self.raw = [base64.urlsafe_b64decode(token) for token in genuine]
        self.wrong_keys = [Fernet(each) for each in self._near(key)]
        self.plain = [Fernet(key).decrypt(token) for token in genuine]
        self.ways: dict[str, Callable[[], str]] = {
            "characters changed": self.changed,
            "bits flipped": self.flipped,
            "first block aimed at": self.aimed,
            "cut": self.cut,
            "lengthened": self.lengthened,
            "spliced": self.spliced,
            "spliced in blocks": self.spliced_blocks,
            "other key": self.other_key,
            "other encoding": self.reencoded,
            "no token at all": self.invented,
        }

    def draws(self, count: int) -> Iterator[tuple[str, str]]:
        """(way, string), each way as often as the others, no string twice."""
        names = list(self.ways)
        drawn = set(self.held)
        for number in range(count):
            way = names[number % len(names)]
            forged = self.ways[way]()
            while forged in drawn:
                forged = self.ways[way]()
            drawn.add(forged)
            yield way, forged

    def changed(self) -> str:
        chars = list(self.draw.choice(self.genuine))
        for _ in range(self.draw.randint(1, 3)):
            chars[self.draw.randrange(len(chars))] = self.draw.choice(ALPHABET)
        return "".join(chars)

    def flipped(self) -> str:
        raw = bytearray(self.draw.choice(self.raw))
        for _ in range(self.draw.randint(1, 3)):
            raw[self.draw.randrange(len(raw))] ^= 1 << self.draw.randrange(8)
        return _encoded(raw)

    def aimed(self) -> str:
        """Flipped bits of the IV flip the same bits of the first block: without a MAC this names another target."""
        raw = bytearray(self.draw.choice(self.raw))
        for at in range(IV.start + 11, IV.stop):
            raw[at] ^= self.draw.randrange(8)
        return _encoded(raw)

    def cut(self) -> str:
        token, raw = self.draw.choice(self.genuine), self.draw.choice(self.raw)
        if self.draw.random() < 0.5:
            return token[: self.draw.randrange(len(token))] if self.draw.random() < 0.5 else token[self.draw.randrange(1, len(token)) :]
        keep = len(raw) - 16 * self.draw.randint(1, (len(raw) - 25) // 16)
        return _encoded(raw[:keep])

    def lengthened(self) -> str:
        token = self.draw.choice(self.genuine)
        more = self.draw.choice(["A", "=", "AAAA", token, "\n", "." + token, self.draw.choice(ALPHABET) * self.draw.randint(1, 8)])
        return token + more if self.draw.random() < 0.7 else more + token

    def spliced(self) -> str:
        one, other = self.draw.sample(self.genuine, 2)
        at = self.draw.randrange(1, min(len(one), len(other)))
        return one[:at] + other[at:]

    def spliced_blocks(self) -> str:
        """Along the seams of the format: one token's time, IV, ciphertext blocks or MAC in another one."""
        one, other = (bytearray(each) for each in self.draw.sample(self.raw, 2))
        blocks = (min(len(one), len(other)) - 25 - MAC_BYTES) // 16
        block = 25 + 16 * self.draw.randrange(blocks)
        part = self.draw.choice([slice(1, 9), IV, slice(block, block + 16), slice(-MAC_BYTES, None)])
        one[part] = other[part]
        return _encoded(one)

    def other_key(self) -> str:
        return self.draw.choice(self.wrong_keys).encrypt(self.draw.choice(self.plain)).decode()

    def reencoded(self) -> str:
        """The same bytes, as other characters that a lenient decoder would take."""
        token = self.draw.choice(self.genuine)
        at = self.draw.randrange(len(token) + 1)
        body = token.rstrip("=")
        spare = body[:-1] + ALPHABET[ALPHABET.index(body[-1]) ^ 1] + "=" * (len(token) - len(body))
        ways = [
            token[:at] + self.draw.choice(FOREIGN) + token[at:],
            token.replace("-", "+").replace("_", "/"),
            body if body != token else token + "==",
            spare,
            token.swapcase(),
            token.replace("=", "%3D") + "\n",
            base64.urlsafe_b64encode(token.encode()).decode(),
        ]
        return self.draw.choice(ways)

    def invented(self) -> str:
        plain, at_random = self.draw.choice(self.plain), self.draw.randbytes(self.draw.randint(0, 200))
        header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
        ways = [_encoded(at_random), _encoded(b"\x80" + at_random), plain.decode(), _encoded(plain), f"{header}.{_encoded(plain)}.", ""]
        return self.draw.choice(ways)

    def _near(self, key: bytes) -> Iterator[bytes]:
        """Keys that are not ours: random ones, halves swapped, one half ours, one bit off, zeros."""
        raw = base64.urlsafe_b64decode(key)
        for _ in range(20):
            yield key_of(self.draw)
        for near in (raw[16:] + raw[:16], bytes(16) + raw[16:], raw[:16] + raw[:16], bytes([raw[0] ^ 1]) + raw[1:], bytes(32)):
            yield base64.urlsafe_b64encode(near)


class Lenient(Tokens):
    """The control: as `Tokens`, without the rule that a token re-encodes to itself."""

    def _open(self, token: str) -> Claims | None:
        try:
            return Claims.model_validate_json(self._fernet.decrypt(token))
        except Exception:  # noqa: BLE001  # whatever it is, the control refuses
            return None


class Unsigned(Tokens):
    """The control: decrypts and never compares the MAC."""

    def __init__(self, key: bytes) -> None:
        super().__init__([key])
        self._aes = algorithms.AES(base64.urlsafe_b64decode(key)[16:])

    def _open(self, token: str) -> Claims | None:
        try:
            raw = base64.urlsafe_b64decode(token.encode("ascii"))
            box = raw[IV.stop : -MAC_BYTES]
            decryptor = Cipher(self._aes, modes.CBC(raw[IV])).decryptor()
            unpadder = padding.PKCS7(128).unpadder()
            padded = decryptor.update(box) + decryptor.finalize()
            return Claims.model_validate_json(unpadder.update(padded) + unpadder.finalize())
        except (ValueError, binascii.Error, UnicodeEncodeError, ValidationError):
            return None


def key_of(draw: random.Random) -> bytes:
    """A Fernet key, drawn."""
    return base64.urlsafe_b64encode(draw.randbytes(32))


def _encoded(raw: bytes | bytearray) -> str:
    return base64.urlsafe_b64encode(raw).decode()

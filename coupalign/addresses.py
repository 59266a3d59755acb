"""Find and hide the passwords and tokens in addresses.

A configuration, and everything a run writes, is shown to others. So an address in it holds no
secret: `find_secret` says which one it has, for a refusal. An address from the environment may hold
one; `hide_secret` masks it in every text that is printed, logged or written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote, unquote_plus

MASK = "***"

# A text may be long and somebody else's, so no pattern may take more than linear time.

# With one slash, it is an address that was taken for a path.
_SCHEME = (
    r"(?:[a-zA-Z][a-zA-Z0-9+.-]{0,40}://"
    r"|(?:https?|s3|gs|ftps?|postgresql|mysql[+a-z]{0,40}):/(?!/))"
)

# One address in a text. A quote, a bracket or white space ends it.
_ADDRESS = re.compile(rf"(?P<scheme>{_SCHEME})(?P<rest>[^\s'\"`<>{{}}\\]*)")

# What may end in a login without a scheme, such as user:password@host.
_BEFORE_AT = re.compile(r"(?<![^\s/@'\"])[^\s/@'\"]+(?=@[\w\[])")
_BEFORE_LOGIN = re.compile(r"(?:\A|[\s'\"=(\[,])(?://)?\Z")

# One name=value after `?`, `&`, `;` or `#`; the punctuation of a sentence may end the value.
_PARAMETER = re.compile(r"(?P<name>(?<=[?&;#])[^=&;?#\s]+)=(?P<value>[^&;#\s'\"`<>\\]*)")
_PUNCTUATION = ")]:,."

# Names of parameters that carry a secret: in a part of the name, or as the whole name.
_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|pwd|signature|credential|authorization"
    r"|api[-_.]?key|access[-_.]?key|private[-_.]?key|account[-_.]?key"
    r"|^(?:.*[-_])?(?:auth|code|jwt|key|pass|pw|sas|sig)$"
)

# Schemes whose user name alone may be a token (http://TOKEN@host), or a key with its secret.
_TOKEN_SCHEMES = ("http", "https", "s3", "s3a", "gs", "ftp", "ftps")


def find_secret(address: str) -> str | None:
    """Say which secret an address holds: "a password", "a user or token", "a secret (sig=…)".

    Returns None if there is none, also for a local path. The answer never has the secret itself.
    """
    for kind, _, _ in _secrets_in(address):
        return kind
    return None


def hide_secret(text: str, *known: str | None) -> str:
    """Mask the secrets of all addresses in a text. Masking twice changes nothing more.

    Args:
        known: addresses or plain secrets that the text may repeat in another form, as the errors of
            libraries do: their secrets are masked wherever they are, percent-decoded as well.
    """
    for secret in _spellings(known):
        text = text.replace(secret, MASK)

    spans = sorted((start, end) for _, start, end in _secrets_in(text))
    hidden, position = "", 0
    for start, end in spans:
        if start >= position:
            hidden += text[position:start] + MASK
            position = end
    return hidden + text[position:]


def _secrets_in(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the kind, the start and the end of each secret in a text."""
    for address in _ADDRESS.finditer(text):
        scheme = address["scheme"].partition(":")[0].lower()
        rest, start = address["rest"], address.start("rest")

        end_of_login = _end_of_login(scheme, rest)
        if end_of_login is not None:
            login = rest[:end_of_login]
            if ":" in login and not login.endswith(":"):
                yield "a password", start, start + end_of_login
            elif scheme in _TOKEN_SCHEMES:
                yield "a user or token", start, start + end_of_login

    for before_at in _BEFORE_AT.finditer(text):
        start = before_at.start()
        begins_login = _BEFORE_LOGIN.search(text[max(0, start - 3) : start]) is not None
        begin = _begin_of_login(before_at[0], begins_login)
        if begin is not None:
            yield "a password", start + begin, before_at.end()

    for parameter in _PARAMETER.finditer(text):
        name = unquote_plus(parameter["name"]).lower()
        value, start = parameter["value"].rstrip(_PUNCTUATION), parameter.start("value")
        if value and _SECRET_NAME.search(name):
            yield f"a secret ({parameter['name'][:40]}=…)", start, start + len(value)


def _end_of_login(scheme: str, rest: str) -> int | None:
    """Find the `@` behind user and password in what follows the scheme; None without one."""
    authority = re.match(r"[^/?#]*", rest)[0]
    if "@" in authority:
        return authority.rindex("@")

    # Drivers of databases accept a password with a slash, a question mark or a number sign in it,
    # which moves the @ out of the authority.
    _, colon, after = authority.partition(":")
    is_port = after.isdigit() and scheme in _TOKEN_SCHEMES
    if colon and not is_port and "@" in rest:
        return rest.rindex("@")
    return None


def _begin_of_login(text: str, begins_login: bool) -> int | None:
    """Find user:password at the end of a text; None if there is none.

    Args:
        begins_login: whether a login may begin with the text. Within it, one may begin after `=`,
            `(`, `[` or a comma.
    """
    begin = 0
    while (colon := text.find(":", begin)) >= 0:
        # No user has an equals sign.
        equals = text.rfind("=", begin, colon)
        if equals >= 0:
            begin, begins_login = equals + 1, True
        if not begins_login:
            opening = re.search(r"[(\[,]", text[begin:colon])
            begin = colon if opening is None else begin + opening.end()

        if begin < colon < len(text) - 1:
            return begin
        begin, begins_login = colon + 1, False
    return None


def _spellings(known: tuple[str | None, ...]) -> list[str]:
    """The secrets of known addresses as a text may repeat them, the longest first."""
    spellings: set[str] = set()
    for address in known:
        if not address:
            continue
        secrets = [address[start:end] for _, start, end in _secrets_in(address)]
        if not secrets and "://" not in address:
            secrets = [address]

        for secret in secrets:
            # Of user:password, the password alone is the secret. A token may be the user.
            user, _, password = secret.partition(":")
            for part in (secret, password or user):
                spellings |= {part, unquote(part), unquote_plus(part)}

    # Shorter ones would mask ordinary letters.
    long_enough = [spelling for spelling in spellings if len(spelling) >= 4 and spelling != MASK]
    return sorted(long_enough, key=len, reverse=True)

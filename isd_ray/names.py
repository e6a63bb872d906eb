"""What names and places may look like: names of runs become folders, places are paths or URIs.

What a person gives is printed, saved with the results and sent to trackers: a URI holds no key.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from isd_ray.errors import LONGEST, UserError, nearest, shown

NAME = re.compile(r"[A-Za-z0-9_=+,-][A-Za-z0-9._=+,-]*")
SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")  # what pyarrow.fs opens
WITHOUT_BUCKET = ("file", "hdfs", "viewfs")  # these begin with a host, which may be left out
WITH_PORT = ("hdfs", "viewfs", "http", "https")
SECRET = ("key", "secret", "token", "password", "credential", "signature")  # in a parameter's name
NAMES = "it becomes a folder's name: letters, digits and . _ - = + , are taken; no . begins it"
MOST_TEXT = 4096  # characters of one value, as of a path
REMEDY = (
    "what stands in a URI is seen in process lists, printed, saved and sent to trackers; give the "
    "store its environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a profile"
)


def check_name(name: str, what: str) -> str:
    """Return `name`, of a file or folder to be; raises UserError that begins with `what`."""
    if fault := name_fault(name):
        raise UserError(f"{what} {shown(name)}: {fault}")
    return name


def name_fault(name: str) -> str | None:
    """Return why a name is none, or None."""
    if len(name) > LONGEST:
        return f"it has {len(name):,} characters, at most {LONGEST} are taken"
    return None if NAME.fullmatch(name) else NAMES


def check_place(uri: str, option: str) -> str:
    """Return `uri`, a path or the URI of a folder or file; raises UserError that names the option.

    The message repeats no secret that the URI may hold.
    """
    if fault := place_fault(uri):
        raise UserError(f"{option} {shown(uri)}: {fault}")
    return uri


def place_fault(uri: str) -> str | None:
    """Return why this is no path or URI, without repeating it, or None."""
    if not uri.strip():
        return "it is empty; give a path or a URI (an unset variable?)"
    return text_fault(uri) or secret_fault(uri) or _scheme_fault(uri)


def text_fault(text: str) -> str | None:
    """Return why a text cannot be a value, or None: it is endless, or a terminal would obey it."""
    if len(text) > MOST_TEXT:
        return f"it has {len(text):,} characters, at most {MOST_TEXT:,} are taken"
    if not all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text):
        return "it holds unprintable characters"
    return None


def secret_fault(uri: str) -> str | None:
    """Return why a URI may hold a secret, or None. A name alone is none: gs://anonymous@bucket."""
    place, _, parameters = uri.partition("?")
    if ":/" not in place:
        return None  # a path
    pairs = [pair.partition("=") for pair in re.split("[&;]", unquote(parameters))]
    names, values = [name.lower() for name, _, _ in pairs], [value for _, _, value in pairs]
    if "sig" in names or any(word in name for name in names for word in SECRET):
        return f"a parameter of it names a key; {REMEDY}"
    if any(map(_holds_password, [unquote(place), *values])) or any(map(_names_user, values)):
        return f"it holds a key; {REMEDY}"
    return None


def _names_user(value: str) -> bool:
    """Tell whether a parameter is user:password@host."""
    user, colon, rest = value.partition(":")
    return bool(colon) and "/" not in user and "@" in rest


def _holds_password(uri: str) -> bool:
    """Tell whether this is scheme://user:password@...; the password may hold a slash."""
    scheme, mark, rest = uri.partition(":/")
    rest = rest.lstrip("/")
    if not mark or "@" not in rest:
        return False
    user, colon, password = rest.partition(":")
    if not colon or "/" in user or "@" not in password:
        return scheme == "s3" and "@" in rest.partition("/")[0]  # the name is half of a key
    is_port = scheme in WITH_PORT and re.match(r"\d{1,5}/", password)  # hdfs://host:8020/a@b
    return not is_port


def _scheme_fault(uri: str) -> str | None:
    scheme, mark, rest = uri.partition("://")
    if not mark:
        if uri.startswith("~") and os.path.expanduser(uri) == uri:
            return f"there is no home folder for {shown(uri.partition('/')[0])}"
        scheme, colon, _ = uri.partition(":")
        if not colon or scheme.lower() not in SCHEMES:
            return None
        return f"a URI begins with {scheme.lower()}://; write ./{scheme}: for such a path"
    if scheme not in SCHEMES:
        return f"unknown scheme.{nearest(scheme.lower(), SCHEMES)} There are {', '.join(SCHEMES)}"
    host, _, path = rest.partition("?")[0].partition("/")
    if scheme == "file" and (host or not path.strip("/")):
        return "give an absolute path: file:///folder"
    if scheme not in WITHOUT_BUCKET and not host.rpartition("@")[2]:
        return f"it names no bucket: {scheme}://bucket/folder"
    return None


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of lists and mappings, names among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield str(name)
            yield from texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)

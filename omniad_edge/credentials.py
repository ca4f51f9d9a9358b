"""Addresses as they may be shown: in names, messages, records and logs."""

import re

HIDDEN = "***"

# "://" and all up to the host; a password may itself hold "@", or "/" where it was not percent-encoded.
LOGIN = re.compile(r"://(?:[^\s/?#\"']*@|[^\s/?#@:\"']+:(?!\d+/)[^\s?#@\"']*@)")
SETTING = re.compile(r"(?<![\w-])([A-Za-z][\w-]*)=(\"[^\"]*\"|'[^']*'|[^&;#\s\"']+)")
SECRET = ("token", "password", "passwd", "passphrase", "secret", "apikey", "credential", "signature", "username")
SECRET_WORDS = {"auth", "jwt", "key", "login", "pass", "pw", "pwd", "session", "sig", "user", "usr"}


def without_credentials(text: object) -> str:
    """`text`, an address or any message that holds some, with user names, passwords and tokens as `***`.

    Covered: `scheme://user:password@host`, and settings `name=value`, in a query or in a GStreamer pipeline,
    whose name says that they are secret, as `token`, `api_key`, `pwd` or `user-id`.
    """
    return SETTING.sub(_hide_secret, LOGIN.sub(f"://{HIDDEN}@", str(text)))


def _hide_secret(setting: re.Match) -> str:
    name = setting[1].lower()
    words = re.split("[-_]", name)
    # "key" only as the last word: x264enc's key-int-max is none.
    secret = words[-1] in SECRET_WORDS or words[0] in SECRET_WORDS - {"key"}
    return f"{setting[1]}={HIDDEN}" if secret or any(part in name for part in SECRET) else setting[0]

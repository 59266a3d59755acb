"""Passwords and tokens in addresses are found, and masked in every text."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coupalign.addresses import MASK, find_secret, hide_secret

WITH_SECRET = [
    "postgresql://mlflow:hunter2@127.0.0.1:1/db",
    "mysql+pymysql://mlflow:hunter2@127.0.0.1:1/db",
    "postgresql://mlflow:hunter2/with?all#signs@host/db",
    "postgresql://mlflow:p@hunter2@host/db",
    "postgresql:///db?host=/run&user=me&password=hunter2",
    "http://hunter2token@127.0.0.1:1",
    "http://u:hunter2@127.0.0.1:1",
    "HTTPS://hunter2token:x-oauth-basic@host",
    "http://:hunter2@host",
    "http://127.0.0.1:1/?token=hunter2",
    "http://host/shards?a=1&access_token=hunter2",
    "http://host/shards?a=1&X-Amz-Signature=hunter2&b=2",
    "https://account.blob.core.windows.net/c?sv=2021&sig=hunter2",
    "https://host/a?AWSAccessKeyId=A&Signature=hunter2",
    "https://host/a?api%5Fkey=hunter2",
    "https://host/a?key=hunter2",
    "https://host/a#access_token=hunter2",
    "s3://AKIA:hunter2@bucket/a",
    "user:hunter2@host:5000",
    "//user:hunter2@host:5000",
    "http:/user:hunter2@host/shards/index.json",
]

WITHOUT_SECRET = [
    "",
    "data/shards/refcoco",
    "/data/a@b:c/shards",
    "sqlite:////home/me:x@y/mlflow.db",
    "sqlite:///runs/mlflow.db",
    "http://127.0.0.1:5000",
    "http://[::1]:5000/a",
    "https://host/path@v1:2/x",
    "https://host:8080/path@v1",
    "http:/host/path@v1",
    "https://host/a?version=2&monkey=1&tokens_per=",
    "s3://bucket/refcoco",
    "postgresql://mlflow@host/db",
    "databricks://profile",
    "bert-base-uncased",
    "random:~/weights/bert",
    "hf_hub:timm/swin_base_patch4_window12_384.ms_in22k",
]


@pytest.mark.parametrize("address", WITH_SECRET)
def test_address_with_a_secret_is_found_and_masked(address: str) -> None:
    kind = find_secret(address)

    assert kind is not None and "hunter2" not in kind

    hidden = hide_secret(f"cannot open '{address}' (try again)")
    assert "hunter2" not in hidden and MASK in hidden
    assert hidden.startswith("cannot open '") and hidden.endswith("' (try again)")
    assert hide_secret(hidden) == hidden


@pytest.mark.parametrize("address", WITHOUT_SECRET)
def test_address_without_a_secret_stays(address: str) -> None:
    assert find_secret(address) is None
    assert hide_secret(f"override 'tracking.uri={address}'") == f"override 'tracking.uri={address}'"


def test_punctuation_behind_a_masked_parameter_stays() -> None:
    text = "MLflow (http://host/?a=1&token=hunter2): no answer from http://host/?key=hunter2."

    assert hide_secret(text) == text.replace("hunter2", MASK)


def test_error_that_repeats_a_decoded_password_is_masked() -> None:
    address = "mysql+pymysql://mlflow:hun%40ter2@host/db"

    text = hide_secret("access denied for mlflow (using 'hun@ter2' and hun%40ter2)", address)

    assert text == f"access denied for mlflow (using '{MASK}' and {MASK})"
    assert hide_secret("token abcdef refused", "abcdef") == f"token {MASK} refused"


def test_known_address_without_a_secret_masks_nothing() -> None:
    text = "http://host:5000 does not answer"

    assert hide_secret(text, "http://host:5000", None, "") == text


plain = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
passwords = st.text(st.characters(exclude_categories=["C"]), min_size=8, max_size=30)


@settings(deadline=None)
@given(
    scheme=st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "s3", "ftp"]),
    user=plain,
    password=passwords,
    before=st.text(max_size=20),
)
@example(scheme="http", user="u", password=":@/?#[]&", before="://")
def test_no_encoded_password_survives(scheme: str, user: str, password: str, before: str) -> None:
    secret = "Zq" + quote(password, safe="") + "qZ"
    address = f"{scheme}://{user}:{secret}@host/db"

    assert find_secret(address) == "a password"
    assert secret not in hide_secret(f"{before} {address} and more")


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab:/@?&=#;.'\" tokensig%p"), max_size=60))
@example(text="http://a:b@c?token=x")
def test_masking_is_idempotent_and_finds_what_it_masks(text: str) -> None:
    hidden = hide_secret(text)

    assert hide_secret(hidden) == hidden
    assert (hidden != text) <= (find_secret(text) is not None)


@pytest.mark.parametrize("part", ["a:b,", "x=a:b", "(a", "a+", "mysql+", "?a=),", "http:/"])
def test_long_foreign_text_takes_linear_time(part: str) -> None:
    """Quadratic time would be minutes here: a stranger's configuration may have a megabyte."""
    text = part * 200_000

    hidden = hide_secret(f"{text} http://u:hunter2@host")

    assert hidden == f"{text} http://{MASK}@host"

"""Tenants in a key file: content, limits on requests, quotas that the controller receives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Quota, QuotasSet
from clockwork_serve.serve.gateway.access import FIELDS, Caps, KeyRing, Right, Tenant
from clockwork_serve.serve.supervisor.link import Quotas
from clockwork_serve.units import NS_PER_S, ms
from tests.serve.gateway.keys import entry, replaced, written

ROOT = Path(__file__).parents[3]
GOLD = '[[tenants]]\nname = "gold"\ndevice_ms_per_s = 250.5\nloaded_bytes_per_s = 100\nburst_s = 0.5\n'
SILVER = '[[tenants]]\nname = "silver"\nmin_slo_ms = 20\nmax_priority = 4\ndecide_ms = 30\n'
OF_GOLD = entry("a", "k", "infer") + 'tenant = "gold"\n'


def test_keys_may_share_a_tenant_and_the_default_is_their_holder(tmp_path: Path) -> None:
    second = OF_GOLD.replace(entry("a", "k", "infer"), entry("b", "l", "infer"))
    ring = KeyRing(written(tmp_path, GOLD, OF_GOLD, second, entry("c", "m", "infer")))
    holders = [ring.authorize(Right.INFER, None, key) for key in (b"k", b"l", b"m")]
    assert [(one.name, one.tenant) for one in holders] == [("a", "gold"), ("b", "gold"), ("c", "c")]


def test_a_tenant_s_fields_are_read(tmp_path: Path) -> None:
    ring = KeyRing(written(tmp_path, GOLD, SILVER, OF_GOLD))
    assert ring.tenants() == {
        "gold": Tenant(name="gold", device_ms_per_s=250.5, loaded_bytes_per_s=100, burst_s=0.5),
        "silver": Tenant(name="silver", min_slo_ns=ms(20), max_priority=4, decide_ns=ms(30)),
    }


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (GOLD + GOLD, "each tenant once; found 'gold' again in tenants[1]"),
        (GOLD.replace('"gold"', '"g d"'), "a name of 1 to 64 letters"),
        (GOLD.replace('name = "gold"', ""), "found none"),
        (GOLD.replace("burst_s", "burst_ms"), "found 'burst_ms'"),
        (
            GOLD.replace("0.5", "0"),
            "tenants[0].burst_s to be a number from 0.001 to 3600; found 0 ",
        ),
        (GOLD.replace("250.5", "-1"), "tenants[0].device_ms_per_s to be a number"),
        (GOLD.replace("250.5", "inf"), "found inf"),
        (GOLD.replace("250.5", "nan"), "found nan"),
        (GOLD.replace("250.5", '"much"'), "found 'much'"),
        (GOLD.replace("= 100", "= 1.5"), "tenants[0].loaded_bytes_per_s to be a whole number"),
        (GOLD.replace("= 100", "= true"), "found True"),
        (
            SILVER.replace("= 4", "= 16"),
            "tenants[0].max_priority to be a whole number from 1 to 15; found 16",
        ),
        (SILVER.replace("= 20", "= 0"), "tenants[0].min_slo_ms"),
        (SILVER, "keys[0].tenant to be the name of a table [[tenants]]; found 'gold'"),
        ("tenants = 3", "keys as TOML"),
    ],
)
def test_an_invalid_table_is_an_error(tmp_path: Path, tables: str, words: str) -> None:
    path = written(tmp_path, tables, OF_GOLD)
    with pytest.raises(ConfigError) as caught:
        KeyRing(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith("api_keys: expected ")


def test_caps_relax_slos_and_priorities_of_their_tenant_only() -> None:
    caps = Caps(lambda: {"t": Tenant(name="t", min_slo_ns=ms(20), max_priority=6)})
    assert [caps.of("t", ms(asked))[0] for asked in (1, 20, 50)] == [ms(20), ms(20), ms(50)]
    assert [caps.of("t", 1, asked)[1] for asked in (0, 1, 6, 7, 99)] == [0, 6, 6, 7, 99]
    assert (caps.of("u", 1, 1), caps.of("", 1), Caps().of("t", 1)) == ((1, 1), (1, 0), (1, 0))
    low = Caps(lambda: {"t": Tenant(name="t", max_priority=9)})
    assert low.of("t", 1, 0) == (1, 9), "the usual class is 8"


def test_the_request_the_tenant_and_the_model_say_in_this_order_how_long_a_verdict_may_take() -> None:
    caps = Caps(lambda: {"t": Tenant(name="t", decide_ns=ms(30)), "u": Tenant(name="u")})
    assert [caps.decide_ns("t", asked, ms(9)) for asked in (-1, 0, ms(5))] == [ms(30), 0, ms(5)]
    assert [caps.decide_ns(tenant, -1, ms(9)) for tenant in ("u", "v", "")] == [ms(9)] * 3


def test_the_controller_receives_quotas(tmp_path: Path) -> None:
    gold = Quota(tenant="gold", burst_ns=NS_PER_S // 2, device_ns_per_s=ms(250.5), loaded_bytes_per_s=100)
    assert Quotas(written(tmp_path, GOLD, SILVER, OF_GOLD)).frames() == [QuotasSet(quotas=(gold,))]
    assert Quotas(written(tmp_path, SILVER, entry("a", "k", "infer"))).frames() == []
    assert Quotas("").frames() == []


async def _told_after(path: str, content: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    import asyncio

    monkeypatch.setattr("clockwork_serve.serve.supervisor.link.REFRESH_S", 0.01)
    quotas, told = Quotas(path), list[object]()
    task = asyncio.ensure_future(quotas.keep_fresh(told.append))
    await asyncio.sleep(0.05)
    assert told == []
    replaced(path, content)
    for _ in range(5000):
        await asyncio.sleep(0.01)
        if told:
            break
    task.cancel()
    return told


async def test_changed_quotas_are_sent_again_even_if_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, GOLD, OF_GOLD)
    told = await _told_after(path, entry("a", "k", "infer"), monkeypatch)
    assert told == [QuotasSet(quotas=())]


def test_the_example_is_read_and_the_page_knows_every_field() -> None:
    tenants = KeyRing(str(ROOT / "examples" / "keys.toml")).tenants()
    assert {name: tenant.max_priority for name, tenant in tenants.items()} == {"shop": 4, "reports": 12}
    page = (ROOT / "docs" / "operate" / "tenants.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(FIELDS)

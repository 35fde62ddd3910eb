"""Our tables beside what a compiler makes of declarations with Calico's members, in BTF.

The declarations are ours, after calico felix/bpf-gpl (conntrack_types.h, nat_types.h, routes.h, ifstate.h, arp.h,
counters.h), v3.31 to master.
"""

from __future__ import annotations

import subprocess

import pytest

from calitrace.btf import KIND_STRUCT, KIND_TYPEDEF, KIND_UNION, Btf
from calitrace.calico import mapbtf, maptables
from calitrace.calico.maps import RawMap, identify

DECLARATIONS = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#ifdef IPVER6
typedef struct { u32 a, b, c, d; } ip_addr;
#define PAD2 60
#else
typedef u32 ip_addr;
#define PAD2 46
#endif
struct ct_key { u32 protocol; ip_addr addr_a, addr_b; u16 port_a, port_b; };
struct ct_leg { u64 bytes; u32 packets; u32 seqno; u32 syn_seen:1, ack_seen:1, fin_seen:1, rst_seen:1, approved:1,
                opener:1, workload:1; u32 ifindex; };
struct ct_value { u64 rst_seen; u64 last_seen; u8 type; u8 flags; u8 flags3; u8 flags4; u8 pad0[3]; u8 flags2;
  union {
    struct { struct ct_leg a_to_b, b_to_a; ip_addr tun_ip, orig_ip; u16 orig_port, orig_sport; ip_addr orig_sip; };
    struct { struct ct_key nat_rev_key; u16 nat_sport; u8 pad2[PAD2]; };
  };
};
struct lpm { u32 prefixlen; u8 data[0]; };
struct __attribute__((packed)) fe { u32 prefixlen; ip_addr addr; u16 port; u8 protocol; ip_addr saddr; u8 pad; };
union fe_key { struct lpm lpm; struct fe key; };
struct fe_value { u32 id, count, local, affinity_timeo, flags; };
struct be_key { u32 id, ordinal; };
struct be_value { ip_addr addr; u16 port; u8 pad[2]; };
struct service { ip_addr addr; u16 port; u8 protocol; };
struct aff_key { struct service nat_key; ip_addr client_ip; u32 padding; };
struct aff_value { struct be_value nat_dest;
#ifdef IPVER6
  u32 __pad;
#endif
  u64 ts; };
struct rt { u32 prefixlen; ip_addr addr; };
union rt_key { struct lpm lpm; struct rt key; };
struct rt_value { u32 flags; union { ip_addr next_hop; u32 if_index; }; };
struct if_value { u32 flags; char name[16]; int xdp_policy_v4, ingress_policy_v4, egress_policy_v4, xdp_policy_v6,
                  ingress_policy_v6, egress_policy_v6, tc_filter_ingress, tc_filter_egress; };
struct arp_key { ip_addr ip; u32 ifindex; };
struct arp_value { char mac_src[6], mac_dst[6]; };
struct cnt_key { u32 ifindex, hook; };
typedef u64 counters_t[27];
struct ct_key a; struct ct_value b; union fe_key c; struct fe_value d; struct be_key e; struct be_value f;
struct aff_key g; struct aff_value h; union rt_key i; struct rt_value j; struct if_value l;
struct arp_key m; struct arp_value n; struct cnt_key o; counters_t p;
"""
MAPS = (
    ("cali_v{}_ct3", "ct_key", "ct_value"),
    ("cali_v{}_ct4", "ct_key", "ct_value"),
    ("cali_v{}_nat_fe3", "fe_key", "fe_value"),
    ("cali_v{}_nat_be", "be_key", "be_value"),
    ("cali_v{}_nat_aff", "aff_key", "aff_value"),
    ("cali_v{}_routes", "rt_key", "rt_value"),
    ("cali_iface4", "u32", "if_value"),
    ("cali_v{}_arp2", "arp_key", "arp_value"),
    ("cali_counters6", "cnt_key", "counters_t"),
)


@pytest.fixture(scope="module", params=[4, 6])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Btf]:
    """(IP version, the BTF of the declarations)."""
    where = tmp_path_factory.mktemp("btf")
    (where / "d.c").write_text(DECLARATIONS)
    version = ["-DIPVER6"] if request.param == 6 else []
    made = subprocess.run(
        ["gcc", "-gbtf", "-c", *version, "d.c", "-o", "d.o"], cwd=where, capture_output=True, text=True, check=False
    )
    if "-gbtf" in made.stderr:
        pytest.skip("this gcc makes no BTF: it is older than 12")
    assert made.returncode == 0, made.stderr
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.BTF", "--set-section-flags", ".BTF=alloc", "d.o", "d"],
                   cwd=where, check=True)  # fmt: skip
    return request.param, Btf((where / "d").read_bytes())


@pytest.mark.parametrize(("name", "key", "value"), MAPS, ids=lambda each: str(each))
def test_a_table_has_every_member_where_the_compiler_puts_it(
    compiled: tuple[int, Btf], name: str, key: str, value: str
) -> None:
    version, types = compiled
    name = name.format(version)
    ids = [types.find(each, KIND_STRUCT, KIND_UNION, KIND_TYPEDEF) or 0 for each in (key, value)]
    raw = RawMap(name, "", 1, types.size(ids[0]), types.size(ids[1]), 1, 1, [])
    table = maptables.resolve(raw)
    assert [maptables.disagreement(part, types, each) for part, each in zip(
        (table.key, table.value), ids, strict=True)] == ["", ""]  # fmt: skip
    found = mapbtf.describe(raw, types, ids[0], ids[1])
    assert found is not None
    assert (found.base, found.version, found.origin) == (*identify(name)[:2], "btf")
    assert sorted(found.key.rows) == sorted(table.key.rows)
    assert sorted(found.value.rows) == sorted(table.value.rows)
    if "_ct" in name:
        assert found.forward_at == table.forward_at


def test_a_moved_member_is_found(compiled: tuple[int, Btf]) -> None:
    """The comparison can fail: an older table beside today's structs."""
    version, types = compiled
    value = types.find("fe_value", KIND_STRUCT)
    assert value is not None
    assert maptables.disagreement(maptables.Table("2 u32 id", 20), types, value) != ""
    assert version in (4, 6)

"""Whose an address is: this machine's alone, or the public internet's."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# What ipaddress calls global, in some releases at least, though it is no public machine's: IETF
# protocol assignments, relays from IPv6 to IPv4, multicast.
_OTHER_V4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4")))
# Global unicast is 2000::/3, less what tunnels (Teredo and others in 2001::/23, 6to4 in 2002::/16)
# and examples have of it. Loopback, link-local, site-local and unique local are outside of it.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_OTHER_V6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
)
# IPv4 inside of IPv6, where the address in the last four bytes counts: mapped, and NAT64.
_V4_IN_V6 = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))


def is_loopback(host: str) -> bool:
    """Whether only the machine itself can reach a name or address."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_public(address: str) -> bool:
    """Whether an IP address is a public machine's; False for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:  # it names a network of this machine
            return False
        if not _within(ip, _V4_IN_V6):
            return ip in _UNICAST_V6 and not _within(ip, _OTHER_V6)
        ip = ipaddress.IPv4Address(ip.packed[-4:])
    return ip.is_global and not _within(ip, _OTHER_V4)


def _within(ip: _Address, networks: Iterable[_Network]) -> bool:
    return any(ip in network for network in networks)

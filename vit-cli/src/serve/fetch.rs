//! Pictures from URLs, if the operator allows it: never from this machine or its private network.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use axum::body::Bytes;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use super::fault::Fault;

const PATIENCE: Duration = Duration::from_secs(20);
const MAX_REDIRECTS: u32 = 3;

/// Fetches pictures.
#[derive(Clone)]
pub struct Fetcher {
    agent: ureq::Agent,
    limit: u64,
}

impl Fetcher {
    pub fn new(limit: usize) -> Self {
        let config = ureq::Agent::config_builder()
            // a proxy would resolve the name itself, and could be made to reach what this server must not
            .proxy(None)
            .max_redirects(MAX_REDIRECTS)
            .timeout_global(Some(PATIENCE))
            .user_agent(concat!("vit-cli/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), Public(DefaultResolver::default()));
        Self { agent, limit: limit as u64 }
    }

    pub async fn get(&self, url: String) -> Result<Bytes, Fault> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || this.fetch(&url));
        done.await.unwrap_or_else(|_| Err(Fault::internal("fetching panicked")))
    }

    fn fetch(&self, url: &str) -> Result<Bytes, Fault> {
        let fail = |why: &dyn std::fmt::Display| Fault::input(format!("{url}: {why}"));
        let response = self.agent.get(url).call().map_err(|e| fail(&e))?;
        let mut bytes = Vec::new();
        let mut body = response.into_body().into_reader().take(self.limit.saturating_add(1));
        body.read_to_end(&mut bytes).map_err(|e| fail(&e))?;
        if bytes.len() as u64 > self.limit {
            return Err(fail(&format_args!("larger than {} bytes", self.limit)));
        }
        Ok(bytes.into())
    }
}

/// Resolves names to public addresses only. Redirects go through it, too, because each connection is resolved anew.
#[derive(Debug)]
struct Public(DefaultResolver);

impl Resolver for Public {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.0.resolve(uri, config, timeout)?;
        // one private address among public ones is how names are rebound, so all of them must be public
        if found.iter().all(|address| is_public(address.ip())) {
            return Ok(found);
        }
        Err(ureq::Error::Io(std::io::Error::new(
            std::io::ErrorKind::PermissionDenied,
            "the address is private or of this machine, which this server does not fetch from",
        )))
    }
}

/// Whether an address is reachable from anywhere, so that fetching from it reveals nothing about this network.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(a == 0
        || a >= 224 // multicast, reserved, broadcast
        || ip.is_loopback()
        || ip.is_private()
        || ip.is_link_local()
        || ip.is_documentation()
        || (a == 100 && (64..128).contains(&b)) // carriers' NAT
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19))) // benchmarks
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let [first, second, ..] = ip.segments();
    // an IPv4 address in any of its disguises
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    let inside = match (first, second) {
        (0x64, 0xff9b) => ip.octets().last_chunk::<4>().copied(),
        (0x2002, _) => ip.octets().get(2..6).and_then(|b| b.try_into().ok()),
        _ => None,
    };
    if let Some(v4) = inside {
        return is_public_v4(v4.into());
    }
    // 2000::/3 is all that is routed; less documentation
    first & 0xe000 == 0x2000 && !(first == 0x2001 && second == 0xdb8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_fetched_from() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "::127.0.0.1",
            "ff02::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }
}

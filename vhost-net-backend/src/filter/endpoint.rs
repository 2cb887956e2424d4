//! Where one end of a connection with QEMU is, in the words of QEMU's command line: `unix:PATH` or `tcp:HOST:PORT`, and
//! `,server` to listen there.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A place to connect to or to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address; IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// How a connection comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where.
    pub address: Address,
    /// QEMU connects to us; else we connect, again and again until it is there.
    pub listens: bool,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, options) = text.split_once(',').unwrap_or((text, ""));
        let listens = match options {
            "" if !text.contains(',') => false,
            "server" | "server=on" => true,
            _ => return Err(format!("'{options}' is no option: ',server' is the only one")),
        };
        let address = match place.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Address::Unix(path.into()),
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or("tcp:HOST:PORT needs a port")?;
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                let port = port.parse().map_err(|_| format!("'{port}' is no TCP port"))?;
                if host.is_empty() {
                    return Err("tcp:HOST:PORT needs a host; 0.0.0.0 is all addresses of this one".into());
                }
                Address::Tcp { host: host.into(), port }
            }
            _ => return Err("neither unix:PATH nor tcp:HOST:PORT".into()),
        };
        Ok(Self { address, listens })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(f, "unix:{}", path.display())?,
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}")?,
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}")?,
        }
        f.write_str(if self.listens { ",server" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_written() {
        for text in [
            "unix:/run/a",
            "unix:/run/a:b,server",
            "tcp:127.0.0.1:9001",
            "tcp:[::1]:9004,server",
            "tcp:host-a:1",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        let endpoint: Endpoint = "tcp:::1:9004,server=on".parse().unwrap();
        assert_eq!(endpoint.address, Address::Tcp { host: "::1".into(), port: 9004 });
        assert!(endpoint.listens);
        for wrong in [
            "",
            "/run/a",
            "unix:",
            "tcp:9001",
            "tcp::9001",
            "tcp:a:b",
            "tcp:a:70000",
            "unix:a,",
            "unix:a,wait=off",
        ] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
        }
    }
}

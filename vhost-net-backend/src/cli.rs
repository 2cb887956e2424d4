//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;

use crate::device::MacAddress;

/// Serves a guest's network card over vhost-user and connects it to a tap.
///
/// Without more, it is a plain back end: frames pass between the guest and the tap. With --protected and a controller on
/// the control socket it is one half of COLO's proxy: on the primary what the guest receives is mirrored to the peer, and
/// what it sends is held until the secondary has sent the same.
#[derive(Debug, Parser)]
#[command(version, name = "vhost-net-backend", max_term_width = 100)]
pub struct Cli {
    /// Unix socket to listen on for the VMM.
    ///
    /// A stale socket there is replaced. QEMU: `-chardev socket,id=c,path=PATH -netdev vhost-user,id=n,chardev=c -device
    /// virtio-net-pci,netdev=n`, and guest RAM with share=on.
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Tap to connect the guest to. It is made if it is missing, and brought up.
    ///
    /// Plug it into a bridge with `ip link set NAME master BRIDGE`.
    #[arg(long, value_name = "NAME")]
    pub tap: String,

    /// Unix socket to listen on for a controller, as `colo run` is one (docs/control-protocol.md).
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// The same as an inherited descriptor that listens already.
    #[arg(long, value_name = "FD", conflicts_with = "control_path")]
    pub control_fd: Option<RawFd>,

    /// Let nothing pass until a controller says otherwise, and never again when it is lost.
    #[arg(long)]
    pub protected: bool,

    /// MAC address of the card, for a VMM that reads it from the back end.
    ///
    /// QEMU does not: give it `mac=` there.
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddress>,

    /// How long to look for the next frame before sleeping, at most, in microseconds; 0 is not at all.
    ///
    /// The time used adapts to how soon frames come. Polling shortens latency and costs the core.
    #[arg(long, value_name = "US", default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub poll_us: u64,

    /// Core to run on. Keep it free of vCPUs.
    #[arg(long, value_name = "N")]
    pub core: Option<usize>,

    /// How long the primary holds a frame that the secondary has not sent before it asks for a checkpoint, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub held_ms_max: u64,

    /// How many bytes the primary holds before it asks for a checkpoint.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    pub held_bytes_max: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let minimal = Cli::try_parse_from(["vhost-net-backend", "--socket-path", "s", "--tap", "t"]).unwrap();
        assert_eq!((minimal.poll_us, minimal.protected, minimal.mac), (50, false, None));
        let both = ["x", "--socket-path", "s", "--tap", "t", "--control-path", "c", "--control-fd", "3"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}

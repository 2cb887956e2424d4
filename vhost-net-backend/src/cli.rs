//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser};

use crate::device::MacAddress;
use crate::proxy::Config;

const FIGURES: &str = "\
The control command `status` answers with:
  pair.phase            plain, closed (waits for orders), paired, undecided (the link is lost), alone, silent
  pair.role             primary or secondary, once attached
  pair.awaiting_commit  secondary: the marker is here, nothing is taken from the link
  pair.link_outgoing_bytes, pair.undelivered_bytes
                        what waits for the peer and for the guest
  pair.proxy            figures of the comparison (primary) or of the rewriting (secondary)
  frames.guest_frames, guest_bytes, lan_frames, lan_bytes
                        what was taken from the guest and from the tap
  frames.guest_malformed, guest_too_long, lan_refused
                        what the guest sent and is no frame, what did not fit its buffers, what the tap refused
  frames.lan_ignored    what came from the LAN while this side had no business there
  rings_running, rings_broken
                        queues that the driver has started, and those that it broke with a malformed request
  dirty_log_missed      writes past the end of the dirty log; anything but 0 is a fault

COLO_LOG says how much is logged: error, warn, info (default), debug, trace.";

/// Serves a guest's network card over vhost-user and connects it to a tap.
///
/// Without more, it is a plain back end: frames pass between the guest and the tap. With --protected and a controller on
/// the control socket it is one half of COLO's proxy: on the primary what the guest receives is mirrored to the peer, and
/// what it sends is held until the secondary has sent the same.
#[derive(Debug, Parser)]
#[command(version, name = "vhost-net-backend", max_term_width = 100, after_long_help = FIGURES)]
#[command(group = ArgGroup::new("control").args(["control_path", "control_fd"]))]
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
    #[arg(long, value_name = "FD")]
    pub control_fd: Option<RawFd>,

    /// Let nothing pass until a controller says otherwise, and never again when it is lost.
    #[arg(long, requires = "control")]
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

impl Cli {
    /// What the proxy is to know.
    pub fn proxy_config(&self) -> Config {
        let mut config = Config::default();
        config.compare.held_us_max = self.held_ms_max.saturating_mul(1000);
        config.compare.patient_us_max = config.compare.patient_us_max.max(config.compare.held_us_max);
        config.compare.held_bytes_max = self.held_bytes_max;
        // the guest is slowed down only well after a checkpoint was asked for
        config.compare.held_bytes_full =
            config.compare.held_bytes_full.max(self.held_bytes_max.saturating_mul(2));
        config
    }
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
        let nobody = ["x", "--socket-path", "s", "--tap", "t", "--protected"];
        assert!(Cli::try_parse_from(nobody).is_err(), "nobody could ever open it");
    }
}

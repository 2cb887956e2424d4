//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::device::{MacAddress, PAIRS_MAX};
use crate::lan::Null;
use crate::policy::Policy;
use crate::proxy::{Config, DigestMode};

const FIGURES: &str = "\
The control command `status` answers with:
  pair.phase            plain, closed (waits for orders), paired, undecided (the link is lost), alone, silent
  pair.role             primary or secondary, once attached
  pair.awaiting_commit  secondary: the marker is here, nothing is taken from the link
  pair.link_outgoing_bytes, pair.undelivered_bytes
                        what waits for the peer and for the guest
  pair.clock_us         now, on the clock of all times (at_us) below
  pair.proxy            figures of the comparison (primary) or of the rewriting (secondary)
  pair.proxy.compare.bypassed, svm_packets_unused
                        what left uncompared, and what of the SVM nobody needed, as --policy has it
  pair.proxy.compare.mismatches, held_too_long
                        how often a packet of the primary could leave with a checkpoint only
  pair.proxy.compare.recent_mismatches
                        the last 32 of these, newest first: when, why, which flow, how many of it so far, and where the
                        bytes differ the offset, 16 bytes before and 16 from there on of either side (hexadecimal)
  pair.proxy.compare.mismatches_by_service
                        their number for each service, the 32 with most; overcount may be others'
  pair.proxy.digest     secondary, with digests: output_bytes is what its guest sent, link_bytes what that took on the link
  pair.proxy.svm_link_bytes, compare.digests, compare.asked
                        primary: bytes of the link for the secondary's output, segments that came as digests, times when
                        bytes had to be asked for
  frames.guest_frames, guest_bytes, lan_frames, lan_bytes
                        what was taken from the guest and from the LAN
  frames.guest_malformed, guest_too_long, lan_refused
                        what the guest sent and is no frame, what did not fit its buffers, what the kernel refused
  frames.guest_unusable with --protected: what would leave to the guest what it has not negotiated
  frames.lan_missed, lan_unusable
                        with --interface: what the kernel had no room for until the guest took it, and what was left to
                        the receiver in a form that nobody here knows
  frames.lan_ignored    what came from the LAN while this side had no business there
  frames.lan_filtered   what came from the LAN and the driver does not want (control queue)
  queue_pairs           the same frames, for each queue pair
  rings_running, rings_broken
                        queues that the driver has started, and those that it broke with a malformed request
  dirty_log_missed      writes past the end of the dirty log; anything but 0 is a fault

COLO_LOG says how much is logged: error, warn, info (default), debug, trace.";

/// What `--print-capabilities` prints, as docs/interop/vhost-user.json of QEMU describes it.
pub const CAPABILITIES: &str = r#"{"type": "net"}"#;

/// Serves a guest's network card over vhost-user and connects it to a tap or an interface.
///
/// Without more, it is a plain back end: frames pass between the guest and the LAN, with what either leaves to the other
/// (checksums, segmentation). With --protected and a controller on the control socket it is one half of COLO's proxy: on
/// the primary what the guest receives is mirrored to the peer, and what it sends is held until the secondary has sent
/// the same.
#[derive(Debug, Parser)]
#[command(version, name = "vhost-net-backend", max_term_width = 100, after_long_help = FIGURES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What a running back end is told.
    #[command(subcommand)]
    pub order: Option<Order>,
    /// How a card is served.
    #[command(flatten)]
    pub serve: Serve,
}

/// What a running back end is told.
#[derive(Debug, Subcommand)]
pub enum Order {
    /// Plugs the cable of the guest's card in, or pulls it out
    ///
    /// Nothing passes without it. A VMM that reads the card's state from the back end (--mac) shows it to the guest; QEMU
    /// does not: say `set_link` there.
    Link {
        /// The control socket of the back end (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
        /// Where it is to be
        state: LinkState,
    },
    /// Prints the figures of a running back end, as JSON
    Status {
        /// The control socket of the back end (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
    },
}

/// Of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkState {
    /// In
    Up,
    /// Out
    Down,
}

/// How a card is served.
#[derive(Args, Debug)]
#[group(skip)]
#[command(group = ArgGroup::new("socket").required(true).args(["socket_path", "fd"]))]
#[command(group = ArgGroup::new("lan").required(true).args(["tap", "tap_fd", "macvtap", "interface", "null"]))]
#[command(group = ArgGroup::new("control").args(["control_path", "control_fd"]))]
pub struct Serve {
    /// Unix socket to listen on for the VMM.
    ///
    /// A stale socket there is replaced. QEMU: `-chardev socket,id=c,path=PATH -netdev vhost-user,id=n,chardev=c,queues=N
    /// -device virtio-net-pci,netdev=n,mq=on`, and guest RAM with share=on.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// The same as an inherited descriptor: of a listening socket, or of a connection, which is served until it ends.
    #[arg(long, value_name = "FD")]
    pub fd: Option<RawFd>,

    /// Tap to connect the guest to. It is made if it is missing, and brought up.
    ///
    /// Plug it into a bridge with `ip link set NAME master BRIDGE`. For several queue pairs one that exists must have been
    /// made with multi_queue.
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,

    /// The same as inherited descriptors, one for each queue pair, separated by commas.
    ///
    /// They must have been opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    #[arg(long, value_name = "FDS", value_delimiter = ',')]
    pub tap_fd: Vec<RawFd>,

    /// Macvtap to connect the guest to: a card of the host shared by address, without a bridge.
    ///
    /// Make it with `ip link add link INTERFACE name NAME type macvtap mode bridge`, with the guest's MAC address.
    #[arg(long, value_name = "NAME")]
    pub macvtap: Option<String>,

    /// Interface of the host to give to the guest: all that comes there is the guest's, and it sends there.
    ///
    /// A card, or one end of a veth. It is brought up and made promiscuous; it takes CAP_NET_RAW. The host and its guest
    /// cannot reach each other through it, and it should neither have an address of the host nor be in a bridge.
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,

    /// No LAN at all, to measure: drop, generate:BYTES or reflect.
    #[arg(long, value_name = "WHAT", conflicts_with = "protected")]
    pub null: Option<Null>,

    /// Number of queue pairs, 1 to 16, each with a worker of its own; QEMU's queues must not be more.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=PAIRS_MAX as i64))]
    pub queue_pairs: u16,

    /// Unix socket to listen on for a controller, as `colo run` is one (docs/control-protocol.md), and for orders.
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// The same as an inherited descriptor that listens already.
    #[arg(long, value_name = "FD")]
    pub control_fd: Option<RawFd>,

    /// Let nothing pass until a controller says otherwise, and never again when it is lost.
    #[arg(long, requires = "control")]
    pub protected: bool,

    /// MAC address of the card, for a VMM that reads it from the back end. The control queue is offered then.
    ///
    /// QEMU does not: give it `mac=` there.
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddress>,

    /// How long to look for the next frame before sleeping, at most, in microseconds; 0 is not at all.
    ///
    /// The time used adapts to how soon frames come. Polling shortens latency and costs the core.
    #[arg(long, value_name = "US", default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub poll_us: u64,

    /// Cores for the workers, separated by commas: the first's, the second's, and so on. Keep them free of vCPUs.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub core: Vec<usize>,

    /// How long the primary holds a frame that the secondary has not sent before it asks for a checkpoint, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub held_ms_max: u64,

    /// How many bytes the primary holds before it asks for a checkpoint.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    pub held_bytes_max: usize,

    /// Rules for single flows, as JSON: the list that `net.policy` is in COLO's configuration (docs/policy.md).
    #[arg(
        long,
        value_name = "JSON",
        default_value = "[]",
        hide_default_value = true,
        requires = "protected"
    )]
    pub policy: Policy,
    /// Whether the secondary sends digests of what its guest sends, and bytes only where they are needed.
    ///
    /// The link then carries less than a twentieth of a bulk transfer. The primary's option counts.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    pub digest: DigestMode,

    /// Print what this program can do as JSON, ignore everything else, and end.
    #[arg(long)]
    pub print_capabilities: bool,
}

impl Serve {
    /// What the proxy is to know.
    pub fn proxy_config(&self) -> Config {
        Config {
            policy: self.policy.clone(),
            digest: self.digest,
            ..Config::holding(self.held_ms_max, self.held_bytes_max)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let parse = |line: &str| {
            Cli::try_parse_from(std::iter::once("vhost-net-backend").chain(line.split_whitespace()))
        };
        let minimal = parse("--socket-path s --tap t").unwrap().serve;
        assert_eq!((minimal.poll_us, minimal.protected, minimal.mac), (50, false, None));
        assert_eq!(minimal.digest, DigestMode::Auto);
        assert_eq!(
            parse("--socket-path s --tap t --digest off").unwrap().serve.proxy_config().digest,
            DigestMode::Off
        );
        let fds = parse("--fd 3 --tap-fd 4,5 --queue-pairs 2 --core 1,2").unwrap().serve;
        assert_eq!((fds.tap_fd, fds.core, fds.queue_pairs), (vec![4, 5], vec![1, 2], 2));
        let rules = r#"[{"protocol":"arp","action":"bypass"}]"#;
        parse(&format!("--socket-path s --tap t --control-path c --protected --policy {rules}")).unwrap();
        assert!(matches!(parse("link --control-path c down").unwrap().order, Some(Order::Link { .. })));
        for wrong in [
            "",
            "--socket-path s",
            "--tap t",
            "--socket-path s --tap t --null drop",
            "--socket-path s --tap t --interface i",
            "--socket-path s --tap t --fd 3",
            "--socket-path s --tap t --queue-pairs 0",
            "--socket-path s --tap t --queue-pairs 17",
            "--socket-path s --null discard",
            "--socket-path s --tap t --digest yes",
            "--socket-path s --tap t --control-path c --control-fd 3",
            "--socket-path s --null drop --control-path c --protected",
            "--socket-path s --tap t --control-path c --protected --policy [{}]",
            "--socket-path s --tap t --policy []",
            // nobody could ever open it
            "--socket-path s --tap t --protected",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}

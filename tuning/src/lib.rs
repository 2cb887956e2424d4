//! A laboratory on one machine: hosts, guests, clients and faults, for the demo, the tests and the benchmarks.
//!
//! Two hosts, a client and the switches between them are network namespaces ([`Lab`]). Guests run from an image that is
//! made of Debian packages ([`GuestImage`]), alone ([`Solo`]) or as a protected pair ([`Pair`]). Clients are real ones:
//! redis over one long TCP connection, files with fsync, UDP, ping. Nothing of a laboratory outlives its owner.

mod agent;
mod back_end;
mod benchmark;
mod capture;
mod clients;
mod console;
mod death;
mod dice;
mod disk_guest;
mod guest;
mod host;
mod iperf;
mod migration;
mod namespace;

mod pair;
mod ping;
mod process;
mod programs;
mod redis;
mod run;
mod services;
mod signals;
mod solo;
mod stall;
mod topology;
mod udp;

pub use agent::{Agent, FileLoad, GuestConnection};
pub use back_end::{BackEnd, INCOMING};
pub use benchmark::{BenchmarkLine, redis_benchmark, redis_benchmarks};
pub use capture::{Capture, Sighting};
pub use clients::{Clients, Work};
pub use console::Console;
pub use death::{Death, Survival, kill};
pub use dice::{Dice, random};
pub use disk_guest::{Card, DiskGuest, DiskGuestImage};
pub use guest::{Disk, GuestImage};
pub use host::{Host, Side};
pub use iperf::{Flow, iperf3};
pub use migration::Migration;
pub use namespace::Namespace;

pub use pair::{Pair, PairOptions, Status, VM, configuration};
pub use ping::{Ping, PingResult, round_trip};
pub use process::Process;
pub use programs::{missing, program};
pub use redis::{Redis, RedisLoad, RedisProgress, Reply};
pub use run::Run;
pub use services::{Family, ServiceClients, ServicesImage};
pub use signals::end_on_signals;
pub use solo::{Devices, Solo};
pub use stall::{Stalls, percentile};
pub use topology::{CLIENT, GUEST, GUEST_SECOND, Lab, MAC, last_logs};
pub use udp::{UdpEcho, UdpResult};

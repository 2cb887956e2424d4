//! Heartbeat, arbiter and generations: who goes on when the link is lost.

#!/usr/bin/env python3
"""Drive the very Scheduler of dfly.py in virtual time, over links of any speed, and say how far from the limit it ends.

    simulate.py --peers 1000 --size 500 --rate 1000 --latency 2

Links are fluid: a transfer gets the smaller of its share of the sender's uplink, of the receiver's downlink, and of the
rack links in between.  A peer has --fetchers requests under way, says --ahead ms before a piece ends that it will, and
reports each piece at once.  Control messages take --latency each way, requests to a holder too.
"""
import argparse
import heapq
import json
import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402


class Link:
    """One direction of a cable: its rate in bytes/s and the transfers on it (a dict, since a set has another order each run)."""

    def __init__(self, rate):
        self.rate, self.flows = rate, {}
        self.bytes = 0.0

    def share(self):
        return self.rate / max(1, len(self.flows))


class Flow:
    """One piece moving.  `left` bytes at time `at`, at `rate` since then."""

    def __init__(self, piece, holder, peer, links, size):
        self.piece, self.holder, self.peer, self.links, self.size = piece, holder, peer, links, size
        self.left, self.at, self.rate, self.version, self.began = float(size), 0.0, 0.0, 0, 0.0
        self.told = False
        self.next = None              # the piece that follows on the same connection


class Fact:
    """What a peer will tell the supernode: a call of the world with these facts."""

    def __init__(self, call, *facts):
        self.call, self.facts = call, facts


class Host:
    """A machine with an uplink, a downlink, maybe a rack; the supernode is one too."""

    def __init__(self, name, up, down, rack=None):
        self.name, self.up, self.down, self.rack = name, Link(up), Link(down), rack
        self.running = 0              # orders it has and has not ended
        self.dead = self.bad = False
        self.joined = self.finished = None
        self.ending = set()           # those of them whose end it has announced
        self.unsaid = []              # facts that wait for the next sync
        self.requests = 1             # control requests, register included
        self.met = set()              # hosts it has sent to or fetched from


class Swarm:
    """The world: clock, events, links, hosts, and the scheduler in the middle."""

    def __init__(self, options):
        self.o = options
        self.rng = random.Random(options.seed)
        self.now, self.events, self.order = 0.0, [], 0
        self.length = options.size << 20
        self.layout = dfly.Layout(self.length, dfly.choose_piece_size(self.length))
        self.count = self.layout.count
        rate = options.rate * 125000.0
        self.seed = Host(dfly.SEED, (options.seed_rate or options.rate) * 125000.0, rate)
        self.origin_rate = (options.origin_rate or options.rate) * 125000.0
        self.racks = [(Link(options.core * 125000.0), Link(options.core * 125000.0)) for _ in range(options.racks)] if options.racks else []
        self.hosts = {}
        for i in range(options.peers):
            slow = options.slow and i % options.slow == options.slow - 1
            up = rate / 4 if slow else rate
            self.hosts["p%d" % i] = Host("p%d" % i, up, rate / 4 if slow else rate, i % options.racks if options.racks else None)
        self.s = dfly.Scheduler(up_slots=options.up_slots, seed_slots=options.seed_slots, rng=random.Random(options.seed + 1))
        self.s.add_task("t", self.count)
        self.wrong = 0

    def at(self, delay, call, *args):
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, call, args))

    # -- transfers -----------------------------------------------------------------------------------------------

    def start(self, flow):
        flow.at = flow.began = self.now
        for link in flow.links:
            link.flows[flow] = True
        self.retime({f: True for link in flow.links for f in link.flows})

    def fair(self, flows):
        """Return the max-min fair rate of every flow that has to do with these, as TCP shares links out in the long run."""
        rates, todo = {}, dict.fromkeys(flows)
        while True:
            more = {f: None for flow in todo for link in flow.links for f in link.flows if f not in todo}
            if not more:
                break
            todo.update(more)
        left = {link: [link.rate, len(link.flows)] for flow in todo for link in flow.links}
        while todo:
            tight = min(left, key=lambda link: left[link][0] / left[link][1])
            rate = left[tight][0] / left[tight][1]
            for flow in [f for f in tight.flows if f in todo]:
                rates[flow] = rate
                del todo[flow]
                for link in flow.links:
                    left[link][0] -= rate
                    left[link][1] -= 1
                    if not left[link][1]:
                        del left[link]
        return rates

    def retime(self, flows):
        rates = self.fair(flows) if self.o.fair else {flow: min(link.share() for link in flow.links) for flow in flows}
        for flow, rate in rates.items():
            if rate == flow.rate:
                continue
            flow.left -= flow.rate * (self.now - flow.at)
            flow.at, flow.rate, flow.version = self.now, rate, flow.version + 1
            self.at(max(0.0, flow.left) / rate, self.arrive, flow, flow.version)
            if self.o.ahead and not flow.told:
                self.at(max(0.0, flow.left / rate - self.o.ahead / 1e3), self.nearly, flow, flow.version)

    def end(self, flow):
        flow.version = -1
        for link in flow.links:
            link.flows.pop(flow, None)
        self.retime({f: True for link in flow.links for f in link.flows})

    def arrive(self, flow, version):
        if flow.version != version:
            return
        self.end(flow)
        for link in flow.links:
            link.bytes += flow.size
        holder, peer = flow.holder, flow.peer
        if peer.dead:
            return
        if flow.next is not None:
            self.requested(peer, flow.next, holder, warm=True)
        why = dfly.WRONG_BYTES if holder.bad else None
        self.outcome(peer, flow.piece, holder, why, self.now - flow.began)

    def nearly(self, flow, version):
        if flow.version == version and not flow.told and not flow.peer.dead and len(flow.peer.ending) < self.o.fetchers - 1:
            flow.told = True
            flow.peer.ending.add(flow.piece)
            flow.peer.unsaid.append(Fact(self.soon, flow.piece))
            self.say(flow.peer)

    def outcome(self, peer, num, holder, why, seconds):
        """A peer has got a piece, or not: it tells the supernode."""
        peer.running -= 1
        peer.ending.discard(num)
        peer.unsaid.append(Fact(self.report, num, holder, why, seconds))
        if why or not self.o.hold or peer.running < self.o.fetchers - 1:
            self.say(peer)
        else:
            self.at(self.o.hold / 1e3, self.say_at_last, peer, peer.unsaid[-1])

    # -- control -------------------------------------------------------------------------------------------------

    def say_at_last(self, peer, fact):
        if fact in peer.unsaid:
            self.say(peer)

    def say(self, peer):
        """A sync leaves: with all facts, and with what the peer would queue as it knows it now."""
        peer.requests += 1
        facts, peer.unsaid = peer.unsaid, []
        self.at(self.o.latency / 1e3, self.hear, peer, dfly.AHEAD if peer.running <= self.o.fetchers else 0, facts)

    def hear(self, peer, queue, facts):
        if peer.dead or peer.finished is not None:
            return
        for fact in facts:
            fact.call(peer, *fact.facts)
        if self.s.finished("t", peer.name):
            peer.finished = self.now
            self.s.leave("t", peer.name, self.now)
        else:
            self.s.request("t", peer.name, self.o.fetchers, self.now, queue=queue)
        self.deliver()

    def soon(self, peer, num):
        self.s.soon("t", peer.name, num, self.now)

    def report(self, peer, num, holder, why, seconds):
        if why:
            self.wrong += why == dfly.WRONG_BYTES
            self.s.failed("t", peer.name, num, holder.name, why, self.now)
        else:
            self.s.done("t", peer.name, num, self.now, holder=holder.name, seconds=seconds, nbytes=self.layout.stride)

    def deliver(self):
        for _, name in self.s.woken():
            peer = self.hosts[name]
            for num, holder in self.s.take("t", name):
                peer.running += 1
                self.at(self.o.latency / 1e3, self.order_arrives, peer, num, self.seed if holder == dfly.SEED else self.hosts[holder])

    def order_arrives(self, peer, num, holder):
        if not peer.dead:
            self.at(self.o.latency / 1e3, self.requested, peer, num, holder)

    def requested(self, peer, num, holder, warm=False):
        peer.met.add(holder.name)
        holder.met.add(peer.name)
        if holder.dead:
            self.outcome(peer, num, holder, dfly.REFUSED, 0.0)
            return
        if holder is self.seed and not self.seeded >> num & 1:
            self.held.append((peer, num))
            return
        before = next((f for f in peer.down.flows if f.holder is holder and f.told and f.next is None), None)
        if before:
            before.next = num
            return
        links = [holder.up, peer.down]
        if self.racks and holder.rack != peer.rack:
            if holder.rack is not None:
                links.append(self.racks[holder.rack][0])
            links.append(self.racks[peer.rack][1])
        self.at(0.0 if warm else self.o.ramp / 1e3, self.start, Flow(num, holder, peer, links, self.layout.content_range(num)[1] + dfly.WRAP))

    # -- life ----------------------------------------------------------------------------------------------------

    def seed_piece(self, num):
        self.seeded |= 1 << num
        self.s.seeded("t", num, self.now)
        self.deliver()
        waiting, self.held = self.held, []
        for peer, held in waiting:
            self.requested(peer, held, self.seed)
        if num + 1 < self.count:
            self.at(self.layout.content_range(num + 1)[1] / self.origin_rate, self.seed_piece, num + 1)

    def join(self, peer):
        peer.joined = self.now
        rack = peer.rack if peer.rack is not None else 0
        self.s.add_peer("t", peer.name, peer.name, ("site", "rack%d" % rack), self.now)
        self.hear(peer, dfly.AHEAD, ())

    def kill(self, peer):
        peer.dead = True
        self.s.leave("t", peer.name, self.now)
        for flow in list(peer.up.flows):
            self.end(flow)
            self.outcome(flow.peer, flow.piece, peer, dfly.REFUSED, 0.0)
        for flow in list(peer.down.flows):
            self.end(flow)

    def tick(self):
        self.s.tick(self.now)
        self.deliver()
        if any(h.finished is None and not h.dead for h in self.hosts.values()):
            self.at(self.o.tick, self.tick)

    def run(self):
        began = time.time()
        self.seeded, self.held = 0, []
        peers = list(self.hosts.values())
        for peer in self.rng.sample(peers[1:], self.o.bad):
            peer.bad = True
        if self.o.warm:
            for num in range(self.count):
                self.seeded |= 1 << num
                self.s.seeded("t", num, 0.0)
        else:
            self.at(self.layout.content_range(0)[1] / self.origin_rate, self.seed_piece, 0)
        for i, peer in enumerate(peers):
            self.at(i * self.o.stagger + self.rng.random() * self.o.jitter, self.join, peer)
        one = self.length / (self.o.rate * 125000.0)
        for peer in self.rng.sample(peers[1:], self.o.kill):
            self.at(one / 3, self.kill, peer)
        self.at(self.o.tick, self.tick)
        while self.events and self.now < 100 * one:
            self.now, _, call, args = heapq.heappop(self.events)
            call(*args)
        return self.row(one, time.time() - began)

    def row(self, one, seconds):
        alive = [h for h in self.hosts.values() if not h.dead]
        times = sorted((h.finished if h.finished is not None else float("inf")) - h.joined for h in alive)
        last = max(h.finished if h.finished is not None else float("inf") for h in alive)
        up = sum(h.up.rate for h in alive)
        bound = max(self.length / self.seed.up.rate, self.length / min(h.down.rate for h in alive),
                    len(alive) * self.length / (self.seed.up.rate + up))
        pieces = 1 + (len(alive).bit_length() - 1 + 1) / float(self.count)
        return {"peers": self.o.peers, "pieces": self.count, "makespan_s": round(last, 3), "over_bound": round(last / bound, 4),
                "over_piece_floor": round(last / bound / pieces, 4), "worst_own": round(times[-1] / one, 4),
                "median_s": round(times[len(times) // 2], 3), "p99_9_over_median": round(
                    times[min(len(times) - 1, int(len(times) * .999))] / times[len(times) // 2], 4),
                "seed_copies": round(self.seed.up.bytes / self.length, 3),
                "rack_copies": round(sum(d.bytes for _, d in self.racks) / self.length / len(self.racks), 3) if self.racks else None,
                "partners": round(sum(len(h.met) for h in alive) / len(alive), 1), "requests": round(sum(h.requests for h in alive) / len(alive), 1), "wrong": self.wrong,
                "isolated": sorted(self.s.isolated("t", self.now)), "real_s": round(seconds, 1)}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, kind, text in (
            ("peers", 24, int, ""), ("size", 100, int, "MB"), ("rate", 50, int, "Mbit/s of every link"), ("seed-rate", 0, int, "of the supernode's uplink"),
            ("origin-rate", 0, int, "Mbit/s from the origin"), ("latency", 5.0, float, "ms, one way"), ("racks", 0, int, ""), ("core", 0, int, "Mbit/s of a rack link"),
            ("stagger", 0.0, float, "s between joins"), ("jitter", 0.2, float, "s over which all join"), ("kill", 0, int, "peers killed at a third"),
            ("bad", 0, int, "peers that serve wrong bytes"), ("slow", 0, int, "every n-th host has a quarter of the rate"), ("fetchers", 3, int, ""),
            ("ahead", 20.0, float, "ms; 0: never"), ("ramp", 0.0, float, "ms until a connection that was idle moves bytes"),
            ("hold", 0.0, float, "ms that a good piece waits for company before it is reported"), ("up-slots", 3, int, ""), ("seed-slots", 3, int, ""), ("tick", dfly.TICK_S, float, "s"), ("seed", 1, int, "")):
        p.add_argument("--" + name, type=kind, default=default, help=text)
    p.add_argument("--fair", action="store_true", help="share links out max-min fairly, not by the smallest equal share (slow)")
    p.add_argument("--warm", action="store_true", help="the supernode has the file already")
    return p


def simulate(*arguments):
    """Run one case; return its row."""
    return Swarm(parser().parse_args([str(a) for a in arguments])).run()


if __name__ == "__main__":
    print(json.dumps(Swarm(parser().parse_args()).run()))

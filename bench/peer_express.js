// floor.py's twin on Express and Socket.IO: relays a model's stream to the page's socket.
//
//     node peer_express.js PORT MODEL_URL

const { randomUUID } = require("node:crypto");
const http = require("node:http");
const express = require("express");
const { Server } = require("socket.io");

const [port, modelUrl] = process.argv.slice(2);
const colors = { layout: "floating", primaryColor: "#a855f7", position: "bottom-right" };
const siteConfig = { ...colors, greeting: "Hi! How can I help?" };
const headers = { "Content-Type": "application/json" };
const toModel = { method: "POST", headers, agent: new http.Agent({ keepAlive: true }) };
const sockets = new Map();
const app = express().use(express.json());
const server = http.createServer(app);

new Server(server).on("connection", (socket) => {
  sockets.set(socket.handshake.query.sessionId, socket);
  socket.emit("session_joined", {});
});

function relay(streamId, content) {
  const [socket, said] = [sockets.get(streamId), []];
  let rest = "";
  const call = http.request(modelUrl + "/chat/completions", toModel, (answer) => {
    answer.setEncoding("utf8").on("data", (piece) => {
      const lines = (rest + piece).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const delta = JSON.parse(line.slice(6)).choices[0].delta.content;
        if (!delta) continue;
        socket.emit("message_chunk", { delta, streamId, chunkIndex: said.length });
        said.push(delta);
      }
    });
    answer.on("end", () => socket.emit("message_done", { text: said.join(""), streamId }));
  });
  call.end(JSON.stringify({ model: "m", stream: true, messages: [{ role: "user", content }] }));
}

app.post("/api/session/init", (_, response) => {
  response.json({ sessionId: randomUUID(), wsUrl: "ws://127.0.0.1", siteConfig });
});
app.post("/api/chat", (request, response) => {
  relay(request.body.sessionId, request.body.message);
  response.json({ messageId: "msg-1", status: "processing" });
});
server.listen(Number(port), "127.0.0.1");

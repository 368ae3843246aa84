import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.concurrent.CompletableFuture;

/**
 * Asks with the client of the JDK as it is, which offers HTTP/2 with its first request. Prints a line for each
 * response: status, version, body.
 *
 * <p>java OrdinaryClient.java http://HOST:PORT
 */
public class OrdinaryClient {
    public static void main(String[] given) throws Exception {
        URI infer = URI.create(given[0] + "/v2/models/echo_FP32/infer");
        String small = body(1), large = body(67_000);
        HttpClient client = HttpClient.newHttpClient();
        for (String body : new String[] {small, large, small}) {
            print(client.send(post(infer, BodyPublishers.ofString(body)).build(), BodyHandlers.ofString()));
        }
        print(client.send(HttpRequest.newBuilder(infer.resolve("/v2/health/live")).build(), BodyHandlers.ofString()));
        // Each by a client of its own, for only a connection's first request offers.
        for (String body : new String[] {small, large}) {
            byte[] bytes = body.getBytes();
            HttpRequest chunked = post(infer, BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(bytes))).build();
            print(HttpClient.newHttpClient().send(chunked, BodyHandlers.ofString()));
            HttpRequest expecting = post(infer, BodyPublishers.ofString(body)).expectContinue(true).build();
            print(HttpClient.newHttpClient().send(expecting, BodyHandlers.ofString()));
            HttpRequest plain = post(infer, BodyPublishers.ofString(body)).build();
            CompletableFuture<HttpResponse<String>> later =
                HttpClient.newHttpClient().sendAsync(plain, BodyHandlers.ofString());
            print(later.get());
        }
    }

    private static HttpRequest.Builder post(URI where, HttpRequest.BodyPublisher body) {
        return HttpRequest.newBuilder(where).header("Content-Type", "application/json").POST(body);
    }

    /** A request whose numbers take as many bytes more. */
    private static String body(int spaces) {
        return "{\"inputs\":[{\"name\":\"x\",\"shape\":[1,3],\"datatype\":\"FP32\",\"data\":[1.5,"
            + " ".repeat(spaces) + "-2,3]}]}";
    }

    private static void print(HttpResponse<String> response) {
        System.out.println(response.statusCode() + " " + response.version() + " " + response.body());
    }
}
